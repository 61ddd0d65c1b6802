"""The normalisations a config can name."""

import functools

from flax import nnx

from sympow_jax.config import ModelConfig

# The variance is the mean of (x - mean)^2. Flax's fast one, mean(x^2) - mean^2, cancels where the mean is large.
LayerNorm = functools.partial(nnx.LayerNorm, use_fast_variance=False)


def make_norm(model: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """LayerNorm (with bias) or RMSNorm of the residual stream; statistics in float32, output in `model.dtype`."""
    make = {"layernorm": LayerNorm, "rmsnorm": nnx.RMSNorm}[model.norm]
    return make(model.embed_dim, epsilon=model.norm_eps, dtype=model.dtype, rngs=rngs)
