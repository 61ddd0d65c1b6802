"""One pre-norm residual layer: a mixer over time, then an MLP over features."""

from flax import nnx

from sympow_jax.config import AttentionConfig, ModelConfig, PositionConfig
from sympow_jax.layers.attention import Attention
from sympow_jax.layers.context import Context
from sympow_jax.layers.mlp import MLP
from sympow_jax.layers.norm import make_norm
from sympow_jax.layers.short_conv import ShortConv
from sympow_jax.typing import Array, Float, PyTree


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); kind names the mixer (variants.LAYER_KINDS)."""

    def __init__(
        self, kind: str, model: ModelConfig, attention: AttentionConfig, position: PositionConfig, *, rngs: nnx.Rngs
    ):
        self.mixer_norm = make_norm(model, model.embed_dim, rngs=rngs)
        if kind in ("attention", "window"):
            self.mixer = Attention(kind, model, attention, position, rngs=rngs)
        else:
            self.mixer = ShortConv(kind, model, attention, rngs=rngs)
        if model.mlp != "none":
            self.mlp_norm = make_norm(model, model.embed_dim, rngs=rngs)
            self.mlp = MLP(model, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer; with a state, to the next T tokens of a stream."""
        mixed, state = self.mixer(self.mixer_norm(x), context, state)
        x = x + mixed
        if hasattr(self, "mlp"):
            x = x + self.mlp(self.mlp_norm(x))
        return x, state
