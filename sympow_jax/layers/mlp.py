"""Position-wise feed-forward layers."""

import functools

import jax
from flax import nnx

from sympow_jax.config import ModelConfig
from sympow_jax.layers.linear import make_linear
from sympow_jax.typing import Array, Float

_gelu = functools.partial(jax.nn.gelu, approximate=True)
_ACTIVATIONS = {
    "gelu": _gelu,  # x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),  # x / 2 (1 + erf(x / sqrt(2)))
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
}


class MLP(nnx.Module):
    """down(f(up(x))), f a GELU, or down(f(gate(x)) * up(x)), SwiGLU and GEGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        self.kind, bias = model.mlp, model.mlp_bias == "all"
        self.up = make_linear(model, model.embed_dim, model.mlp_dim, bias=bias, rngs=rngs)
        self.down = make_linear(model, model.mlp_dim, model.embed_dim, bias=bias, residual=True, rngs=rngs)
        if model.is_gated_mlp:
            self.gate = make_linear(model, model.embed_dim, model.mlp_dim, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to each position."""
        activation = _ACTIVATIONS[self.kind]
        if hasattr(self, "gate"):
            return self.down(activation(self.gate(x)) * self.up(x))
        return self.down(activation(self.up(x)))
