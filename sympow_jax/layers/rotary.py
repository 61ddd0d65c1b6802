"""Rotary encodings of queries and keys: of where a token stands (rope) or of learned steps (learned_rope)."""

import dataclasses
import math
from typing import Any

from sympow_jax import ops, variants
from sympow_jax.config import PositionConfig
from sympow_jax.layers.context import Context
from sympow_jax.layers.tokens import Tokens
from sympow_jax.typing import Array, Float, Int, accumulation_dtype

_CONSTANTS = [field.name for field in dataclasses.fields(ops.positions.ScalingConstants)]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotary encoding of one layer; it has no parameters.

    Attributes:
      encoding: the layer's position encoding; all but rope and learned_rope leave q and k as they are.
      config: frequencies and their scaling to longer contexts.
      head_dim: D of queries and keys, of which the first config.rotary_fraction D dims are rotated.
      score_scale: what multiplies q . k; 0 means 1 / sqrt(D).
    """

    encoding: str
    config: PositionConfig
    head_dim: int
    score_scale: float

    def __call__(
        self, tokens: Tokens, context: Context, phase: ops.positions.PhaseState | None, *, keep_keys: bool = False
    ) -> tuple[Tokens, float, ops.positions.PhaseState | None]:
        """The rotated tokens, the scale of the scores, and the phase that the next tokens of a stream start from."""
        scale, T = self.score_scale or 1 / math.sqrt(self.head_dim), tokens.q.shape[1]
        if self.encoding not in variants.ROTARY_POSITIONS:
            return tokens, scale, None
        frequencies, factor = self._frequencies(context, T)
        if self.encoding == "rope":
            phases, next_phase = ops.positions.rope_phases(context.token_positions(T), frequencies), None
        else:
            assert tokens.beta is not None  # the layer of learned_rope has one
            phases, next_phase = ops.positions.learned_phases(
                tokens.beta, frequencies, initial=phase, segment_ids=context.segment_ids
            )
        whole = self._rotary_dim == self.head_dim  # then the factor of q and k is one of their products
        outer, inner = (scale * factor**2, 1.0) if whole else (scale, factor)
        turns = ops.positions.cos_sin(phases.astype(accumulation_dtype(tokens.q)))
        k = tokens.k if keep_keys else ops.positions.rotate_by(tokens.k, turns, inner)
        rotated = dataclasses.replace(tokens, q=ops.positions.rotate_by(tokens.q, turns, inner), k=k)
        return rotated, outer, next_phase

    @property
    def _rotary_dim(self) -> int:
        return int(self.config.rotary_fraction * self.head_dim)

    @property
    def num_rotated(self) -> int:
        """How many dims are rotated, by half of them on: dims i and i + num_rotated / 2 are a plane."""
        return self._rotary_dim if self.encoding in variants.ROTARY_POSITIONS else 0

    @property
    def changes_with_length(self) -> bool:
        """A stream keeps its keys as they were before RoPE, because the frequencies change as it grows."""
        return self.encoding == "rope" and self.config.scaling == "dynamic_ntk"

    def rotate_cached(
        self, k: Float[Array, "B K S D"], positions: Int[Array, "B S"], context: Context, num_tokens: int
    ) -> Float[Array, "B K S D"]:
        """Rotates the keys of a cache by the frequencies of the present length."""
        frequencies, _ = self._frequencies(context, num_tokens)
        phases = ops.positions.rope_phases(positions, frequencies)
        return ops.positions.rotate(k.swapaxes(1, 2), phases).swapaxes(1, 2)

    def _frequencies(self, context: Context, num_tokens: int) -> tuple[Any, float]:
        """inv_freq [D/2], an array of NumPy or JAX, and attention factor, at the context of these tokens."""
        c = self.config
        if c.convention == "manifest":
            return ops.positions.manifest_frequencies(self._rotary_dim, c.max_length), 1.0
        return ops.positions.rope_frequencies(
            self._rotary_dim,
            base=c.base,
            scaling=None if c.scaling == "none" else c.scaling,
            factor=c.factor,
            original_length=c.original_length,
            length=context.length or context.offset + num_tokens,
            constants=ops.positions.ScalingConstants(**{name: getattr(c, name) for name in _CONSTANTS}),
        )
