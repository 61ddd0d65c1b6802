"""ALiBi and gates for kernels that take neither: as a bias of the keys alone, in eight dims beside those of the heads.

Softmax does not see what the keys of a row share, so -slope_h (i - j) is slope_h j, and with 0 for the first position
a product of slopes on the queries' side and positions on the keys': scale q' . k' = scale q . k + slope_h j. bfloat16
holds the digits of j to the base 256 and three parts of slope_h / scale, so that each product is exact in float32 and
the logits carry the rounding of one float32 sum: 2^-8 at 65,536 tokens of the steepest slope. Of the nine pairs of
digits and parts the least is left out, 2^-18 slope_h 255.

Gates are a bias of the keys too: a row's keys share G_i of G_i - G_j, the sums of log gates up to a query and a key,
and what is left of -G_j is parts on the keys' side and 1 on the queries'. Up to a sum of 2^15 the rounding is that of
ALiBi at 65,536 tokens; how large sums are only the call itself can tell (`largest_sum`).
"""

import jax
import jax.numpy as jnp

from sympow_jax.ops.positions.bias_functions import is_alibi
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.typing import Array, Float

EXTRA_DIMS = 8
LARGEST_SUM = 2.0**15
_BASE = 256
# The digits are those of 256^2, 256 and 1, the parts from the largest to the least.
_PAIRS = tuple((digit, part) for digit in range(3) for part in range(3) if (digit, part) != (2, 2))


def obstacle(x: Inputs) -> str | None:
    """What keeps the bias or the gates of a call from being folded, or None."""
    H, K = x.q.shape[2], x.k.shape[2]
    if x.bias is not None and (x.gates is not None or not is_alibi(x.bias)):
        return "of biases it takes ALiBi, without log_gates"
    if x.gates is not None and H != K:
        return f"num_heads={H}, num_kv_heads={K}: with log_gates it takes equal numbers"
    return None if x.q.dtype == jnp.bfloat16 else f"q is {x.q.dtype}, and with ALiBi or log_gates it takes bfloat16"


def folded(x: Inputs, scale: float) -> tuple[Float[Array, "B T H D8"], Float[Array, "B S K D8"]]:
    """Queries and keys with the bias or the gates of `x` in EXTRA_DIMS more dims."""
    return _folded_gates(x, scale) if x.bias is None else _folded_alibi(x, x.bias, scale)


def largest_sum(x: Inputs) -> Float[Array, ""]:
    """The largest of -G_j, to compare with LARGEST_SUM."""
    assert x.gates is not None
    return -jnp.min(x.gates[1][0])


def _folded_gates(x: Inputs, scale: float) -> tuple[Array, Array]:
    assert x.gates is not None
    high, low = x.gates[1]
    parts = _parts(-high / scale) + _parts(-low / scale)
    at_keys = jnp.stack(parts + [jnp.zeros_like(high)] * (EXTRA_DIMS - len(parts)), axis=-1)  # [B, S, K, 8]
    return _beside(x.q, jnp.ones(EXTRA_DIMS)), _beside(x.k, at_keys)


def _folded_alibi(x: Inputs, bias: PositionBias, scale: float) -> tuple[Array, Array]:
    slopes = jax.lax.stop_gradient(bias.params["slopes"]).astype(jnp.float32) / scale
    parts = _parts(slopes)
    at_queries = [parts[part] * float(_BASE ** (2 - digit)) for digit, part in _PAIRS]
    position = x.k_positions - x.k_positions[..., :1]
    digits = (position // _BASE**2, position // _BASE % _BASE, position % _BASE)
    at_keys = jnp.stack([digits[digit] for digit, _ in _PAIRS], axis=-1)  # [S, 8] or [B, S, 8]
    return _beside(x.q, jnp.stack(at_queries, axis=-1)), _beside(x.k, at_keys[..., None, :])


def _parts(number: Float[Array, "*H"]) -> list[Float[Array, "*H"]]:
    """Three numbers of bfloat16's precision, in float32, whose sum is `number` to float32's."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(number, exponent_bits=8, mantissa_bits=7))
        number = number - parts[-1]
    return parts


def _beside(x: Array, more: Array) -> Array:
    more = jnp.broadcast_to(more.astype(x.dtype), (*x.shape[:-1], EXTRA_DIMS))
    return jnp.concatenate([x, more], axis=-1)
