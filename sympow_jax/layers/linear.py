"""Projections with the initialisation of the GPT-2 family."""

import math

from flax import nnx

from sympow_jax.config import ModelConfig


def make_linear(
    model: ModelConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, residual: bool = False, bias: bool = False
) -> nnx.Linear:
    """x W (+ b) with W ~ normal(0, init_std), b = 0.

    Args:
      residual: the output is added to the residual stream: the deviation is divided by sqrt(2 num_layers)
        (Radford et al. 2019), so that the stream's variance does not grow with depth.
    """
    std = model.init_std / (math.sqrt(2 * model.num_layers) if residual else 1.0)
    return nnx.Linear(
        in_dim, out_dim, use_bias=bias, dtype=model.dtype, kernel_init=nnx.initializers.normal(std), rngs=rngs
    )
