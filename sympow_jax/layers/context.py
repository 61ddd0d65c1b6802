"""What every layer of one forward pass shares: where its tokens stand."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops import PositionBias
from sympow_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Positions and documents of the tokens of a pass.

    Attributes:
      offset: tokens of the stream that earlier passes have consumed, a scalar int32.
      positions: [B, T] absolute positions of packed documents; None means offset + 0..T-1.
      segment_ids: [B, T] documents; None means one document a row.
      shared_bias: the additive bias that all layers share (FIRE-S), or None.
      softmax_share: alpha, the weight of attention.blend_from's outputs beside the layer's, a scalar float32; None: not
        computed.
      length: the longest context of the stream, static: what dynamic_ntk scales to; 0 = the tokens seen so far.
    """

    offset: Int[Array, ""]
    positions: Int[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None
    shared_bias: PositionBias | None
    length: int = dataclasses.field(metadata={"static": True})
    softmax_share: Float[Array, ""] | None = None

    def token_positions(self, num_tokens: int) -> Int[Array, "B T"]:
        """Absolute positions [B or 1, T] of the tokens of this pass."""
        if self.positions is not None:
            return self.positions
        return self.offset + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]

    def num_visible(self, num_tokens: int, window: int | None) -> Int[Array, "B T"]:
        """How many keys each token of a whole pass sees, itself included, [B or 1, T]: those of its document so far."""
        index = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
        if self.segment_ids is None:
            count = self.offset + index + 1
        else:
            begins = jnp.pad(self.segment_ids[:, 1:] != self.segment_ids[:, :-1], [(0, 0), (1, 0)])
            count = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1) + 1
        return count if window is None else jnp.minimum(count, window)
