"""The normalisations a config can name."""

from flax import nnx

from sympow_jax.config import ModelConfig


def make_norm(model: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """LayerNorm (with bias) or RMSNorm of the residual stream; statistics in float32, output in `model.dtype`."""
    cls = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}[model.norm]
    return cls(model.embed_dim, epsilon=model.norm_eps, dtype=model.dtype, rngs=rngs)
