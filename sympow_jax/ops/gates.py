"""Log gates: the four ways to make them, and their cumulative sums in two floats.

A gate multiplies a weight for every token that passes between key j and query i, exp(sum of log_gates over
(j, i]). The `*_log_gates` functions return float32 values <= 0 (float64 from float64) in the shape attention takes,
[B, T, K].
"""

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.positions.biases import alibi_slopes
from sympow_jax.typing import Array, Float, accumulation_dtype

POWER_GATE_BIAS = 6.906768  # sigmoid of it is 0.999
MIN_LOG_GATE = -1000.0  # exp is exactly 0 far above it; finite, so that differences of sums are never inf - inf


def data_log_gates(logits: Float[Array, "B T K"]) -> Float[Array, "B T K"]:
    """Data-dependent gates, log sigmoid(logits), evaluated in float32; the logits start at a bias.

    FoX starts at 0 (arXiv 2503.02130), power attention at `POWER_GATE_BIAS` (gate 0.999).
    """
    return jax.nn.log_sigmoid(logits.astype(accumulation_dtype(logits)))


def plane_log_gates(log_gates: Float[Array, "B T K N"], num_rotated: int) -> Float[Array, "B T K D"]:
    """Gates of every dim that commute with a rotation of the first `num_rotated` dims: equal on the two of a plane.

    The first num_rotated / 2 numbers are those of the planes, dims i and i + num_rotated / 2; the others of a dim each.
    """
    planes, rest = jnp.split(log_gates, [num_rotated // 2], axis=-1)
    return jnp.concatenate([planes, planes, rest], axis=-1)


def head_log_gates(logits: Float[Array, "K"], batch_size: int, length: int) -> Float[Array, "B T K"]:
    """Learned gates, one per head and the same at every token: log sigmoid(logits), broadcast to [B, T, K]."""
    log_gates = jax.nn.log_sigmoid(logits.astype(accumulation_dtype(logits)))
    return jnp.broadcast_to(log_gates[None, None, :], (batch_size, length, logits.shape[0]))


def fixed_log_gates(num_heads: int, batch_size: int, length: int) -> Float[Array, "B T K"]:
    """Fixed gates exp(-slope_h) with ALiBi's slopes: under softmax, exactly ALiBi."""
    slopes = jnp.asarray(-alibi_slopes(num_heads), jnp.float32)
    return jnp.broadcast_to(slopes[None, None, :], (batch_size, length, num_heads))


def time_scale_logits(num_heads: int, shortest: float, longest: float) -> np.ndarray:
    """Gate logits [K] whose gates forget after T_h tokens, T_h log-spaced over the heads: -log(expm1(1 / T_h)).

    log sigmoid of the result is exactly -1 / T_h. FoX's data-independent initialisation (arXiv 2503.02130).
    """
    if not 0 < shortest <= longest:
        raise ValueError(f"shortest={shortest}, longest={longest}: legal are 0 < shortest <= longest; swap or fix them")
    return -np.log(np.expm1(1.0 / np.geomspace(shortest, longest, num_heads))).astype(np.float32)


def finite_log_gates(log_gates: Float[Array, "B T H *D"]) -> Float[Array, "B T H *D"]:
    """Gates that let nothing pass, down to -inf, as the smallest number whose sums keep their digits, in float32."""
    return jnp.maximum(log_gates.astype(accumulation_dtype(log_gates)), MIN_LOG_GATE)


def cumulative_log_gates(log_gates: Float[Array, "B T H"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cumulative sum over time as a pair (high, low) of floats whose sum is accurate to about 48 bits.

    A difference of two cumulative sums, (high_i - high_j) + (low_i - low_j), is then right wherever in the
    sequence i and j lie; a float32 cumulative sum is wrong by 0.6% at 32k tokens and log gate -5. Gates that let
    nothing pass are made finite first (`finite_log_gates`), so that no difference is inf - inf.
    """
    return _two_float_sum(finite_log_gates(log_gates))


@jax.custom_vjp
def _two_float_sum(x: Array) -> tuple[Array, Array]:
    return jax.lax.associative_scan(add_two_floats, (x, jnp.zeros_like(x)), axis=1)


def add_two_floats(a, b):
    """(a_high + a_low) + (b_high + b_low) as a normalised pair: Knuth's two-sum, then Dekker's quick two-sum."""
    total = a[0] + b[0]
    shadow = total - a[0]
    low = (a[0] - (total - shadow)) + (b[0] - shadow) + (a[1] + b[1])
    high = total + low
    return high, low - (high - total)


def _two_float_sum_backward(_, cotangents):
    d_high, _ = cotangents  # low is a correction of high: the sum's derivative is carried by high alone
    return (jnp.flip(jnp.cumsum(jnp.flip(d_high, 1), 1), 1),)


_two_float_sum.defvjp(lambda x: (_two_float_sum(x), None), _two_float_sum_backward)
