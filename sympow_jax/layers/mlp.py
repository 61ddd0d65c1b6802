"""Position-wise feed-forward layers."""

import jax
from flax import nnx

from sympow_jax.config import ModelConfig
from sympow_jax.layers.linear import make_linear
from sympow_jax.typing import Array, Float


class MLP(nnx.Module):
    """down(gelu(up(x))), or SwiGLU, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        bias = model.mlp == "gelu"
        self.up = make_linear(model, model.embed_dim, model.mlp_dim, bias=bias, rngs=rngs)
        self.down = make_linear(model, model.mlp_dim, model.embed_dim, bias=bias, residual=True, rngs=rngs)
        if model.mlp == "swiglu":
            self.gate = make_linear(model, model.embed_dim, model.mlp_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to each position."""
        if hasattr(self, "gate"):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return self.down(jax.nn.gelu(self.up(x)))
