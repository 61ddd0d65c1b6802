"""Absolute position embeddings that have no parameters."""

import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.positions.frequencies import rope_frequencies
from sympow_jax.ops.positions.rotary import rope_phases
from sympow_jax.typing import Array, Float, Int


def sinusoidal(positions: Int[Array, "B T"], embed_dim: int, *, base: float = 10000.0) -> Float[Array, "B T E"]:
    """Sines and cosines of n * base^(-2i/E), interleaved: [sin, cos, sin, cos, ...] (Vaswani et al. 2017), float32."""
    inv_freq, _ = rope_frequencies(embed_dim, base=base)
    angles = rope_phases(positions, inv_freq)[:, :, 0, :] * np.float32(2 * np.pi)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, embed_dim)
