"""From the op's states to the kernels' and back: whole offsets, with the weight of their products on one side."""

import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.kernels import SQRT2
from sympow_jax.ops.linear_attention.pallas_gpu.tiles import num_offsets, padded
from sympow_jax.ops.linear_attention.pallas_shared import rows_in_padded
from sympow_jax.typing import Array, Float


def padded_last(x: Array) -> Array:
    """x with zeros up to a power of two in its last dim."""
    size = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(size) - size)])


def split_state(
    state: Float[Array, "B K P Dv1"], head_dim: int
) -> tuple[Float[Array, "B K O D Dv"], Float[Array, "B K O D"]]:
    """The op's state [S, z] as the kernels' S and z."""
    D = padded(head_dim)
    if head_dim != D:
        rows = jnp.asarray(rows_in_padded(head_dim, D))
        shape = (*state.shape[:2], D * (D + 1) // 2, state.shape[3])
        state = jnp.zeros(shape, state.dtype).at[:, :, rows].set(state)
    whole = state[:, :, : D * D // 2].reshape(*state.shape[:2], D // 2, D, -1) * _weights(D)
    half = state[:, :, None, D * D // 2 :] / SQRT2
    offsets = jnp.concatenate([whole, jnp.concatenate([half, half], axis=3)], axis=2)
    return padded_last(offsets[..., :-1]), offsets[..., -1]


def join_state(
    state: tuple[Float[Array, "B K O D Dv"], Float[Array, "B K O D"]], head_dim: int, value_dim: int
) -> Float[Array, "B K P Dv1"]:
    """The inverse of `split_state`."""
    values, normaliser = state
    D = values.shape[3]
    offsets = jnp.concatenate([values[..., :value_dim], normaliser[..., None]], axis=-1)
    whole = (offsets[:, :, :-1] / _weights(D)).reshape(*offsets.shape[:2], D * D // 2, -1)
    joined = jnp.concatenate([whole, SQRT2 * offsets[:, :, -1, : D // 2]], axis=2)
    return joined if head_dim == D else joined[:, :, jnp.asarray(rows_in_padded(head_dim, D))]


def _weights(D: int) -> np.ndarray:
    """What the kernels' offsets below D / 2 are of the op's."""
    weights = np.full((1, 1, num_offsets(D) - 1, 1, 1), SQRT2, np.float32)
    weights[:, :, 0] = 1.0
    return weights
