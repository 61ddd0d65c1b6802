"""The normalisations a config can name."""

from flax import nnx

from sympow_jax.config import ModelConfig


def make_norm(model: ModelConfig, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """LayerNorm (with bias) or RMSNorm over the last dim; statistics in float32, output in `model.dtype`."""
    cls = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}[model.norm]
    return cls(dim, epsilon=1e-5, dtype=model.dtype, rngs=rngs)
