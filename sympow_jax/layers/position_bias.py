"""Modules that own the parameters of learned additive biases, and the biases without parameters."""

import jax.numpy as jnp
from flax import nnx

from sympow_jax import ops
from sympow_jax.config import PositionConfig
from sympow_jax.ops import positions as encodings


class BiasParameters(nnx.Module):
    """The parameters of kerple_log, kerple_power, t5 or fire, with the distributions of their papers."""

    def __init__(self, kind: str, num_heads: int, *, rngs: nnx.Rngs):
        self.kind = kind
        for name, value in encodings.init_bias(kind, rngs.params(), num_heads).items():
            setattr(self, name, nnx.Param(value))
        self.names = tuple(encodings.init_bias(kind, rngs.params(), num_heads))

    def bias(self) -> ops.PositionBias:
        """The bias as attention takes it."""
        return encodings.learned_bias(self.kind, {name: getattr(self, name)[...] for name in self.names})


def fixed_bias(kind: str, num_heads: int, position: PositionConfig) -> ops.PositionBias:
    """alibi or sandwich for `num_heads` heads."""
    if kind == "alibi":
        slopes = encodings.alibi_slopes(num_heads) * position.alibi_slope_scale
        return encodings.alibi_bias(jnp.asarray(slopes, jnp.float32))
    return encodings.sandwich_bias(num_heads)
