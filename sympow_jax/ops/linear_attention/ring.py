"""Linear kernels in their quadratic form on a ring of devices, for biases that leave no state to pass on."""

import dataclasses
import math
from typing import Unpack

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import extend_values, normalise
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.residuals import kept
from sympow_jax.ops.softmax_attention.inputs import RingTokens, ring_inputs
from sympow_jax.ops.softmax_attention.ring import ring
from sympow_jax.ops.softmax_attention.tile_sums import dot
from sympow_jax.typing import Array, Float, accumulation_dtype


@dataclasses.dataclass(frozen=True)
class KernelWeights:
    """kernel(score) exp(bias and gates); the sums are those of w v."""

    kernel: Kernel

    def empty(self, q, v):
        """See `tile_sums.Weights`, as for the others."""
        return (jnp.zeros((*q.shape[:-1], v.shape[-1]), accumulation_dtype(q, v)),)

    def add(self, sums, scores, extend, v):
        """Weights keep float32, whatever the dtype of the values."""
        weights = self.kernel.weight(scores) * jnp.exp(extend(jnp.zeros_like(scores)))
        return (sums[0] + dot("bkgij,bkjd->bkgid", weights, v, sums[0].dtype),)

    def finish(self, sums, dtype):
        """The sums themselves; nothing is needed of them."""
        del dtype
        return kept(sums[0]), ()

    def rows(self, residuals, d_out):
        """Nothing."""
        del d_out
        return residuals

    def pull(self, scores, extend, rows, d_weights):
        """Scores and exponents have their own gradients."""
        del rows
        decay = jnp.exp(extend(jnp.zeros_like(scores)))
        weights = self.kernel.weight(scores) * decay
        return weights, d_weights * decay * self.kernel.derivative(scores), d_weights * weights


def linear_attention_ring(
    kernel: Kernel,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    axis: str,
    scale: float | None = None,
    block_size: int | None = None,
    **tokens: Unpack[RingTokens],
) -> Float[Array, "B T H Dv"]:
    """`linear_attention` in its blockwise form, of a sequence that lies on the devices along a mesh axis.

    The arguments are those of `softmax_attention_ring`, the equation is that of `linear_attention`.
    """
    values = extend_values(v, jnp.ones(v.shape[:2], bool))  # the tiles see no padding
    x = ring_inputs(q.astype(accumulation_dtype(q, k, v)), k, values, **tokens)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums: jax.Array = ring(
        x,
        axis=axis,
        weights=KernelWeights(kernel),
        scale=scale,
        window=None,
        block_size=min(block_size or 128, q.shape[1]),
    )
    return normalise(sums, axis=-1).astype(v.dtype)
