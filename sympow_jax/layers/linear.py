"""Projections with the initialisation of the GPT-2 family."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sympow_jax import sharding
from sympow_jax.config import ModelConfig
from sympow_jax.ops.platform import target_platform
from sympow_jax.ops.residuals import PROJECTION
from sympow_jax.typing import Array, Float


class Linear(nnx.Linear):
    """nnx.Linear that, on a single CPU device, sees all tokens as rows of one matrix, and rounds once with a bias.

    XLA's CPU backend runs the weight gradient of a batched product, a contraction over two dims, at half the speed of
    the same product of matrices (benchmarks/train_step). Elsewhere the dims stay apart, so that each can be sharded.
    """

    def __call__(self, x: Float[Array, "*B in_dim"]) -> Float[Array, "*B out_dim"]:
        """x W (+ b)."""
        if sharding.is_sharded() or target_platform() != "cpu":
            return self._apply(x)
        return self._apply(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, x: Float[Array, "*B in_dim"]) -> Float[Array, "*B out_dim"]:
        dtype = jnp.dtype(self.dtype)
        if self.bias is None or dtype.itemsize >= 4:
            return super().__call__(x)
        out = _affine(x.astype(dtype), self.kernel[...].astype(dtype), self.bias[...])
        return checkpoint_name(out, PROJECTION)


@jax.custom_vjp
def _affine(x: Float[Array, "*B in_dim"], kernel: Float[Array, "in_dim out_dim"], bias: Float[Array, "out_dim"]):
    """x W + b of a narrow dtype: the float32 sums take the bias before they are rounded. Gradients are of x's dtype."""
    sums = jnp.einsum("...i,io->...o", x, kernel, preferred_element_type=jnp.float32)
    return (sums + jnp.broadcast_to(bias, sums.shape)).astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel)


def _affine_backward(saved, grad):
    x, kernel = saved
    d_bias = jnp.sum(grad, axis=range(grad.ndim - 1), dtype=jnp.float32)
    return jnp.einsum("...o,io->...i", grad, kernel), jnp.einsum("...i,...o->io", x, grad), d_bias


_affine.defvjp(_affine_forward, _affine_backward)


def make_linear(
    model: ModelConfig,
    in_dim: int,
    out_dim: int,
    *,
    rngs: nnx.Rngs,
    residual: bool = False,
    bias: bool = False,
    dtype: str = "",
    std: float = 0.0,
) -> Linear:
    """x W (+ b) with W ~ normal(0, init_std), b = 0.

    Args:
      residual: the output is added to the residual stream: the deviation is divided by sqrt(2 num_layers)
        (Radford et al. 2019), so that the stream's variance does not grow with depth.
      dtype: compute dtype; "" is model.dtype. Gates and rotary steps use float32.
      std: the deviation of W in place of init_std.
    """
    std = std or model.init_std / (math.sqrt(2 * model.num_layers) if residual else 1.0)
    return Linear(
        in_dim,
        out_dim,
        use_bias=bias,
        dtype=dtype or model.dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
