"""Rotary phases in turns, for fixed (RoPE) and data-dependent (learned) angles, and the rotation itself.

A phase is kept per frequency as a fraction of a full turn, reduced modulo 1 in fixed point, so that it is right
to 1e-5 turns (in fact 1e-7) at a million tokens, and bit-equal however the sequence is split into chunks.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, Bool, Float, Int, PyTree, accumulation_dtype

_LONG = 1 << 14  # phases
_UNIT = 1 << 30  # fixed-point units of learned positions: beta is rounded to multiples of 2^-30


def rope_phases(
    positions: Int[Array, "B T"], inv_freq: Float[np.ndarray, "F"] | Float[Array, "F"]
) -> Float[Array, "B T 1 F"]:
    """Phases positions * inv_freq / 2 pi modulo 1, in turns within [-0.5, 0.5], float32."""
    return phase_turns(positions[:, :, None], inv_freq)


def phase_turns(count: jax.Array, inv_freq: np.ndarray | jax.Array) -> jax.Array:
    """frac(count * inv_freq / 2 pi), [..., F]; count is any integer below 2^32 in size, negative ones included.

    The frequency is split into a multiple of 2^-32 turns, whose product wraps in uint32 arithmetic exactly, and a
    remainder below 2^-33 turns, whose product is small enough for float32.
    """
    return _turns(count[..., None], inv_freq)


def _turns(count: jax.Array, inv_freq: np.ndarray | jax.Array) -> jax.Array:
    """`phase_turns` of a count for all frequencies, [..., 1], or one for each, [..., F]."""
    xp, dtype = (np, np.float64) if isinstance(inv_freq, np.ndarray) else (jnp, jnp.float32)
    scaled = inv_freq.astype(dtype) * dtype(2.0**32 / (2 * math.pi))
    whole = xp.round(scaled)
    shape = (*[1] * (count.ndim - 1), -1)
    steps = jnp.asarray(whole % 2.0**32, jnp.uint32).reshape(shape)
    wrapped = jax.lax.bitcast_convert_type(count.astype(jnp.uint32) * steps, jnp.int32)
    remainder = jnp.asarray(scaled - whole, jnp.float32).reshape(shape)
    return (wrapped.astype(jnp.float32) + count.astype(jnp.float32) * remainder) * np.float32(2.0**-32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhaseState:
    """Where the learned positions of a stream stand: integer + fraction / 2^30, exactly.

    Attributes:
      integer: [B, K] uint32, or [B, K, F] where every frequency has steps of its own.
      fraction: as integer, below 2^30.
      segment_id: [B] int32, the document the sum belongs to.
      twin: zeros as integer, float32, whose gradient is that of the sum; None where no gradient is passed on.
    """

    integer: PyTree
    fraction: PyTree
    segment_id: PyTree
    twin: PyTree = None


def initial_phase_state(batch_size: int, *steps: int) -> PhaseState:
    """The state before the first token, of steps K, or K, F, for the document with segment id 1."""
    zeros = jnp.zeros((batch_size, *steps), jnp.uint32)
    return PhaseState(zeros, zeros, jnp.ones((batch_size,), jnp.int32))


def differentiable(state: PyTree) -> PyTree:
    """The state with a twin in each `PhaseState` of it: gradients of later calls reach the steps of earlier ones."""
    return jax.tree.map(_with_twin, state, is_leaf=lambda part: isinstance(part, PhaseState))


def _with_twin(part: PyTree) -> PyTree:
    if not isinstance(part, PhaseState):
        return part
    return dataclasses.replace(part, twin=jnp.zeros(part.integer.shape, jnp.float32))


def phase_state(beta: Float[Array, "B T K *F"], segment_ids: Int[Array, "B T"] | None = None) -> PhaseState:
    """The state that `learned_phases` returns for these tokens, starting from 0, with a twin, without the phases."""
    start: PhaseState = differentiable(initial_phase_state(beta.shape[0], *beta.shape[2:]))
    starts, final_segment = _document_starts(segment_ids, start)
    integer, fraction = _accumulate(beta, start.integer, start.fraction, starts)
    return PhaseState(integer[:, -1], fraction[:, -1], final_segment, _final_twin(beta, starts))


def sum_phases(integer: jax.Array, fraction: jax.Array, kept: Bool[Array, "S B"]) -> tuple[jax.Array, jax.Array]:
    """The exact sum of the `kept` ones of S < 2^16 learned positions, uint32 [S, B, K *F]: integer and fraction."""
    integer, fraction = (jnp.where(_over(kept, integer), x, jnp.uint32(0)) for x in (integer, fraction))
    low = jnp.sum(fraction & 0x7FFF, axis=0, dtype=jnp.uint32)  # halves of 15 bits, whose sums cannot overflow
    high = jnp.sum(fraction >> 15, axis=0, dtype=jnp.uint32) + (low >> 15)
    whole = jnp.sum(integer, axis=0, dtype=jnp.uint32) + (high >> 15)
    return whole, ((high & 0x7FFF) << 15) | (low & 0x7FFF)


def learned_phases(
    beta: Float[Array, "B T K *F"],
    inv_freq: Float[np.ndarray, "F"],
    *,
    initial: PhaseState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T K F"], PhaseState]:
    """Phases of data-dependent positions mu_i = mu_(i-1) + beta_i, times inv_freq / 2 pi, modulo 1 (arXiv 2503.03269).

    beta, in (0, 2), is rounded to multiples of 2^-30 and summed in integers: exactly, so that chunking, streaming
    and sharding give bit-equal phases. The gradient is that of the unrounded sum; it flows into the twin of `initial`.

    Args:
      beta: steps, 1 + tanh(logits), one a head, or one a head and frequency.
      inv_freq: radians per unit step, from `rope_frequencies`.
      initial: the state to continue from, `differentiable` or not, as the one returned is; None starts at 0.
      segment_ids: documents; the sum restarts at each change.

    Returns:
      phases in turns, and the state after the last token.
    """
    initial = initial_phase_state(beta.shape[0], *beta.shape[2:]) if initial is None else initial
    starts, final_segment = _document_starts(segment_ids, initial)
    integer, fraction = _accumulate(beta, initial.integer, initial.fraction, starts)
    twin = None
    if initial.twin is not None:
        continued = initial.twin if starts is None else jnp.where(_over(starts[:, 0], initial.twin), 0.0, initial.twin)
        beta = beta.at[:, 0].add(continued)  # 0
        twin = _final_twin(beta, starts)
    phases: Any = _learned_turns(beta, integer, fraction, starts, _Frequencies(tuple(map(float, inv_freq))))
    return phases, PhaseState(integer[:, -1], fraction[:, -1], final_segment, twin)


def _document_starts(segment_ids, initial: PhaseState):
    """Where the sum restarts, [B, T] or None, and the document of the last token."""
    if segment_ids is None:
        return None, initial.segment_id
    previous = jnp.concatenate([initial.segment_id[:, None], segment_ids[:, :-1]], 1)
    return segment_ids != previous, segment_ids[:, -1]


def _final_twin(beta, starts):
    """0, [B, K *F] float32, with the gradient of the sum of beta over the last document."""
    if starts is not None:
        later = jnp.cumsum(starts[:, :0:-1], axis=1)[:, ::-1]
        beta = jnp.where(_over(jnp.pad(later, [(0, 0), (0, 1)]) == 0, beta), beta, 0.0)
    total = jnp.sum(beta.astype(jnp.float32), axis=1)
    return total - jax.lax.stop_gradient(total)


def _over(rows, like):
    """What is known of the first dims of an array, with dims of 1 for its others."""
    return rows.reshape(*rows.shape, *[1] * (like.ndim - rows.ndim))


def _accumulate(beta, integer, fraction, starts):
    """Running sums [B, T, K *F] of round(2^30 beta), split into whole units and 2^-30 units; restarted where starts."""
    steps = jnp.round(jax.lax.stop_gradient(beta).astype(jnp.float32) * _UNIT).astype(jnp.uint32)
    low = (integer << 30) + fraction  # the total is high * 2^32 + low, both uint32
    low = jnp.concatenate([low[:, None], steps], 1).cumsum(1, dtype=jnp.uint32)
    carries = (low[:, 1:] < steps).astype(jnp.uint32)
    high = jnp.concatenate([(integer >> 2)[:, None], carries], 1).cumsum(1, dtype=jnp.uint32)
    if starts is None:
        low, high = low[:, 1:], high[:, 1:]
    else:
        low, high = _restart(low, high, starts)
    return (high << 2) + (low >> 30), low & jnp.uint32(_UNIT - 1)


def _restart(low, high, starts):
    """Subtracts from each total [B, 1 + T, K] the one before its document's first token: [B, T, K *F]."""
    index = jnp.arange(starts.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(starts, index[None, :], -1), axis=1)
    start = _over(start, low)
    low_before, high_before = (
        jnp.where(start < 0, jnp.uint32(0), jnp.take_along_axis(a, jnp.maximum(start, 0), 1)) for a in (low, high)
    )
    low, high = low[:, 1:], high[:, 1:]
    return low - low_before, high - high_before - (low < low_before).astype(jnp.uint32)


@dataclasses.dataclass(frozen=True)
class _Frequencies:
    """Hashable frequencies, so that they can be a static argument of a custom VJP."""

    radians: tuple[float, ...]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _learned_turns(beta, integer, fraction, starts, frequencies):
    del beta, starts
    inv_freq = np.asarray(frequencies.radians)
    turns = jnp.asarray(inv_freq / (2 * math.pi), jnp.float32)[None, None, None, :]
    if integer.ndim == 3:  # one position for all frequencies
        integer, fraction = integer[..., None], fraction[..., None]
    phase = _turns(integer, inv_freq) + fraction.astype(jnp.float32) * np.float32(1 / _UNIT) * turns
    return phase - jnp.round(phase)


def _learned_turns_forward(beta, integer, fraction, starts, frequencies):
    return _learned_turns(beta, integer, fraction, starts, frequencies), (beta[:0], starts)


def _learned_turns_backward(frequencies, residuals, d_phases):
    empty_beta, starts = residuals
    turns = jnp.asarray(np.asarray(frequencies.radians) / (2 * math.pi), jnp.float32)
    to_steps = "btkf,f->btk" if empty_beta.ndim == 3 else "btkf,f->btkf"
    d_positions = jnp.einsum(to_steps, d_phases, turns, precision="highest")
    # d beta_j sums d_position_i over i >= j in the same document: a reverse segmented sum.
    if starts is None:
        d_beta = jax.lax.cumsum(d_positions, axis=1, reverse=True)
    else:
        ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], 1)
        ends = jnp.broadcast_to(_over(ends, d_positions), d_positions.shape)
        d_beta, _ = jax.lax.associative_scan(_add_within_segment, (d_positions, ends), axis=1, reverse=True)
    return d_beta.astype(empty_beta.dtype), None, None, None


def _add_within_segment(later, earlier):
    """Segmented sum of pairs (sum, has this span a document end): an end in `earlier` cuts `later` off."""
    return earlier[0] + jnp.where(earlier[1], 0.0, later[0]), later[1] | earlier[1]


_learned_turns.defvjp(_learned_turns_forward, _learned_turns_backward)


def rotate(
    x: Float[Array, "B T H D"], phases: Float[Array, "#B T K F"], factor: float = 1.0
) -> Float[Array, "B T H D"]:
    """Rotates the half-split pairs (x_i, x_(i + F)), i < F, by phases in turns, in float32, and casts back to x.dtype.

    Args:
      x: queries or keys; dims beyond the first 2 F stay as they are.
      phases: F <= D/2 turns, per head or shared: K divides H, and query head h uses phases h // (H / K).
      factor: what the rotated dims are multiplied by.
    """
    return rotate_by(x, cos_sin(phases.astype(accumulation_dtype(x))), factor)


def rotate_by(
    x: Float[Array, "B T H D"], turns: tuple[Float[Array, "#B T K F"], Float[Array, "#B T K F"]], factor: float = 1.0
) -> Float[Array, "B T H D"]:
    """`rotate` by the `cos_sin` of the phases, for queries and keys that share them."""
    B, T, H, _ = x.shape
    K, F = turns[0].shape[2:]
    if x.shape[3] > 2 * F:
        return jnp.concatenate([rotate_by(x[..., : 2 * F], turns, factor), x[..., 2 * F :]], axis=-1)
    dtype = accumulation_dtype(x)
    cos, sin = (turn.astype(dtype)[:, :, :, None, :] for turn in turns)
    if factor != 1:
        cos, sin = factor * cos, factor * sin
    pairs = x.astype(dtype).reshape(B, T, K, H // K, 2 * F)
    first, second = pairs[..., :F], pairs[..., F:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.reshape(B, T, H, 2 * F).astype(x.dtype)


def cos_sin(phases: Float[Array, "#B T K F"]) -> tuple[Float[Array, "#B T K F"], Float[Array, "#B T K F"]]:
    """Cosine and sine of phases in turns."""
    return _cos_sin(phases * (2 * math.pi))


@jax.custom_jvp
def _cos_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, on a CPU in a loop over pieces of long arrays: XLA fuses nothing across a loop.

    It would evaluate both anew in every product with them, forward and backward (RESULTS.md, training step).
    """
    pieces = 8
    if target_platform() != "cpu" or angles.size < _LONG or angles.size % pieces:
        return jnp.cos(angles), jnp.sin(angles)
    cos, sin = jax.lax.map(lambda piece: (jnp.cos(piece), jnp.sin(piece)), angles.reshape(pieces, -1))
    return cos.reshape(angles.shape), sin.reshape(angles.shape)


@_cos_sin.defjvp
def _cos_sin_jvp(primals, tangents):
    cos, sin = _cos_sin(*primals)
    return (cos, sin), (-sin * tangents[0], cos * tangents[0])
