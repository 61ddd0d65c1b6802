"""Projections with the initialisation of the GPT-2 family."""

import math

from flax import nnx

from sympow_jax import sharding
from sympow_jax.config import ModelConfig
from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, Float


class Linear(nnx.Linear):
    """nnx.Linear that, on a single CPU device, sees all tokens as rows of one matrix.

    XLA's CPU backend runs the weight gradient of a batched product, a contraction over two dims, at half the speed of
    the same product of matrices (benchmarks/train_step). Elsewhere the dims stay apart, so that each can be sharded.
    """

    def __call__(self, x: Float[Array, "*B in_dim"]) -> Float[Array, "*B out_dim"]:
        """x W (+ b)."""
        if sharding.is_sharded() or target_platform() != "cpu":
            return super().__call__(x)
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


def make_linear(
    model: ModelConfig,
    in_dim: int,
    out_dim: int,
    *,
    rngs: nnx.Rngs,
    residual: bool = False,
    bias: bool = False,
    dtype: str = "",
) -> Linear:
    """x W (+ b) with W ~ normal(0, init_std), b = 0.

    Args:
      residual: the output is added to the residual stream: the deviation is divided by sqrt(2 num_layers)
        (Radford et al. 2019), so that the stream's variance does not grow with depth.
      dtype: compute dtype; "" is model.dtype. Gates and rotary steps use float32.
    """
    std = model.init_std / (math.sqrt(2 * model.num_layers) if residual else 1.0)
    return Linear(
        in_dim,
        out_dim,
        use_bias=bias,
        dtype=dtype or model.dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
