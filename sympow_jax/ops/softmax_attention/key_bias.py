"""ALiBi for kernels that take no bias: as a bias of the keys alone, in eight dims beside those of the heads.

Softmax does not see what the keys of a row share, so -slope_h (i - j) is slope_h j, and with 0 for the first position
a product of slopes on the queries' side and positions on the keys': scale q' . k' = scale q . k + slope_h j. bfloat16
holds the digits of j to the base 256 and three parts of slope_h / scale, so that each product is exact in float32 and
the logits carry the rounding of one float32 sum: 2^-8 at 65,536 tokens of the steepest slope. Of the nine pairs of
digits and parts the least is left out, 2^-18 slope_h 255.
"""

import jax
import jax.numpy as jnp

from sympow_jax.ops.positions.bias_functions import is_alibi
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.typing import Array, Float

EXTRA_DIMS = 8
_BASE = 256
# The digits are those of 256^2, 256 and 1, the parts from the largest to the least.
_PAIRS = tuple((digit, part) for digit in range(3) for part in range(3) if (digit, part) != (2, 2))


def obstacle(x: Inputs) -> str | None:
    """What keeps the bias of a call from being folded, or None."""
    if x.bias is None or not is_alibi(x.bias):
        return "of biases it takes ALiBi"
    return None if x.q.dtype == jnp.bfloat16 else f"q is {x.q.dtype}, and with ALiBi it takes bfloat16"


def folded(x: Inputs, scale: float) -> tuple[Float[Array, "B T H D8"], Float[Array, "B S K D8"]]:
    """Queries and keys with the bias of `x` in EXTRA_DIMS more dims."""
    assert x.bias is not None
    slopes = jax.lax.stop_gradient(x.bias.params["slopes"]).astype(jnp.float32) / scale
    parts = _parts(slopes)
    at_queries = [parts[part] * float(_BASE ** (2 - digit)) for digit, part in _PAIRS]
    position = x.k_positions - x.k_positions[..., :1]
    digits = (position // _BASE**2, position // _BASE % _BASE, position % _BASE)
    at_keys = jnp.stack([digits[digit] for digit, _ in _PAIRS], axis=-1)  # [S, 8] or [B, S, 8]
    return _beside(x.q, jnp.stack(at_queries, axis=-1)), _beside(x.k, at_keys[..., None, :])


def _parts(number: Float[Array, "H"]) -> list[Float[Array, "H"]]:
    """Three numbers of bfloat16's precision, in float32, whose sum is `number` to float32's."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(number, exponent_bits=8, mantissa_bits=7))
        number = number - parts[-1]
    return parts


def _beside(x: Array, more: Array) -> Array:
    more = jnp.broadcast_to(more.astype(x.dtype), (*x.shape[:-1], EXTRA_DIMS))
    return jnp.concatenate([x, more], axis=-1)
