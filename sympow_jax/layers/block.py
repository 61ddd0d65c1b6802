"""One residual layer: a mixer over time and an MLP over features, with norms before them, behind them, or both."""

from flax import nnx

from sympow_jax.config import LayerSpec, ModelConfig
from sympow_jax.layers.attention import Attention
from sympow_jax.layers.context import Context
from sympow_jax.layers.mlp import MLP
from sympow_jax.layers.norm import make_norm
from sympow_jax.layers.short_conv import ShortConv
from sympow_jax.typing import Array, Float, PyTree


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the spec says what the mixer is.

    model.norm_placement: "pre" as above; "post", x + norm(mixer(x)) (OLMo 2, arXiv 2501.00656); "sandwich",
    x + norm'(mixer(norm(x))) (Gemma 2, arXiv 2408.00118). model.parallel_residual: both in one step,
    x + mixer(norm(x)) + mlp(norm'(x)) (GPT-NeoX, arXiv 2204.06745). model.residual_scale multiplies what is added.
    """

    def __init__(self, spec: LayerSpec, model: ModelConfig, *, rngs: nnx.Rngs):
        self.parallel, self.residual_scale = model.parallel_residual, model.residual_scale
        before, behind = model.norm_placement != "post", model.norm_placement != "pre"
        if before:
            self.mixer_norm = make_norm(model, rngs=rngs)
        self.mixer = (Attention if spec.mixer == "attention" else ShortConv)(spec, model, rngs=rngs)
        if behind:
            self.mixer_out_norm = make_norm(model, rngs=rngs)
        if model.mlp != "none":
            if before:
                self.mlp_norm = make_norm(model, rngs=rngs)
            self.mlp = MLP(model, rngs=rngs)
            if behind:
                self.mlp_out_norm = make_norm(model, rngs=rngs)

    def mixer_input(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What the mixer sees of the residual stream."""
        return self._norm("mixer_norm", x)

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer; with a state, to the next T tokens of a stream."""
        mixed, state = self.mixer(self.mixer_input(x), context, state)
        stream = self._add(x, self._norm("mixer_out_norm", mixed))
        if hasattr(self, "mlp"):
            out = self.mlp(self._norm("mlp_norm", x if self.parallel else stream))
            stream = self._add(stream, self._norm("mlp_out_norm", out))
        return stream, state

    def _add(self, x: Float[Array, "B T E"], out: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return x + (out if self.residual_scale == 1 else out * self.residual_scale)

    def _norm(self, name: str, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """x through the norm of that name, where the placement has it."""
        return getattr(self, name)(x) if hasattr(self, name) else x
