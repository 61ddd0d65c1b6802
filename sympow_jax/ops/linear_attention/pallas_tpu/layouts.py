"""From the op's arrays to the kernels' and back: tokens last, and states in the kernels' order of features."""

import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.kernels import SQRT2, Kernel, TaylorKernel
from sympow_jax.ops.linear_attention.pallas_shared import rows_in_padded
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import SUBLANES
from sympow_jax.typing import Array, Float

PACKED = 2 * SUBLANES  # rows of a bfloat16 tile: head dims are padded to a multiple


def features_of(kernel: Kernel, head_dim: int) -> Features:
    """The features that the kernels compute for a head_dim of the op."""
    return Features(head_dim + -head_dim % PACKED, isinstance(kernel, TaylorKernel))


def rows_of_tokens(x: Float[Array, "B T K *G D"]) -> Float[Array, "R *G rows T"]:
    """Heads before tokens, and tokens last; D padded with zeros to whole tiles."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % PACKED)])
    x = jnp.moveaxis(x, 1, -1)
    return x.reshape(-1, *x.shape[2:])


def tokens_of_rows(x: Float[Array, "R G rows T"], batch_size: int, head_dim: int) -> Float[Array, "B T K G D"]:
    """The inverse of `rows_of_tokens`."""
    x = x.reshape(batch_size, -1, *x.shape[1:])
    return jnp.moveaxis(x, -1, 1)[..., :head_dim]


def split_state(
    features: Features, state: Float[Array, "R P Dv1"], head_dim: int
) -> tuple[Float[Array, "R rows features"], Float[Array, "R M M"]]:
    """The op's state [S, z] as the kernels' S, values first, and the second moments of the keys behind z."""
    R, D = state.shape[0], features.head_dim
    if head_dim != D:
        rows = jnp.asarray(_rows_in_padded(head_dim, features))
        state = jnp.zeros((R, _size(features, D), state.shape[2]), state.dtype).at[:, rows].set(state)
    values, z = jnp.swapaxes(state[..., :-1], 1, 2), state[..., -1]
    first = features.taylor * (1 + D)
    parts = [_swap_offsets(values[..., first:], D // 2 // SUBLANES, SUBLANES, D)]
    if features.taylor:
        parts += [values[..., 1:first], values[..., :1], jnp.zeros((R, values.shape[1], SUBLANES - 1), values.dtype)]
    values = jnp.concatenate(parts, axis=-1)
    values = jnp.pad(values, [(0, 0), (0, -values.shape[1] % PACKED), (0, 0)])
    moments = _matrix(features, z[:, first:])
    if features.taylor:
        moments = jnp.pad(moments, [(0, 0), (0, SUBLANES), (0, SUBLANES)])
        moments = moments.at[:, D, : D + 1].set(jnp.roll(z[:, :first], -1, axis=1))
        moments = moments.at[:, :D, D].set(z[:, 1:first])
    return values, moments


def join_state(
    features: Features,
    values: Float[Array, "R rows features"],
    moments: Float[Array, "R M M"],
    head_dim: int,
    value_dim: int,
) -> Float[Array, "R P Dv1"]:
    """The inverse of `split_state`."""
    D, values = features.head_dim, values[:, :value_dim]
    squares = _swap_offsets(values[..., : features.squares], SUBLANES, D // 2 // SUBLANES, D)
    z = _offsets(features, moments[:, :D, :D])
    if features.taylor:
        one = features.squares + D
        squares = jnp.concatenate([values[..., one : one + 1], values[..., one - D : one], squares], axis=-1)
        z = jnp.concatenate([moments[:, D, D : D + 1], moments[:, D, :D], z], axis=-1)
    state = jnp.swapaxes(jnp.concatenate([squares, z[:, None]], axis=1), 1, 2)
    return state if head_dim == D else state[:, jnp.asarray(_rows_in_padded(head_dim, features))]


def _swap_offsets(x: Array, outer: int, inner: int, D: int) -> Array:
    """[..., (outer inner D) + D / 2] -> [..., (inner outer D) + D / 2]: between r = 8 a + b and the kernels' order."""
    *batch, _ = x.shape
    whole = x[..., : D * D // 2].reshape(*batch, outer, inner, D)
    return jnp.concatenate([jnp.swapaxes(whole, -3, -2).reshape(*batch, -1), x[..., D * D // 2 :]], axis=-1)


def _weights(features: Features) -> Array:
    """Of x_i x_(i + r) in phi, r = 0 .. D / 2."""
    ones = jnp.ones(features.head_dim // 2 + 1).at[0].set(1 / SQRT2)
    return ones if features.taylor else SQRT2 * ones


def _matrix(features: Features, z: Float[Array, "R squares"]) -> Float[Array, "R D D"]:
    """The symmetric matrix of sums of k_i k_j from the squares of z, row by row of offsets, through a skew."""
    R, D = z.shape[0], features.head_dim
    offsets = jnp.pad(z, [(0, 0), (0, D // 2)]).reshape(R, D // 2 + 1, D) / _weights(features)[None, :, None]
    offsets = offsets.at[:, 0].multiply(0.5)  # the sum with the transpose counts the diagonal twice
    rows = jnp.pad(jnp.swapaxes(offsets, 1, 2), [(0, 0), (0, 0), (0, D // 2 - 1)])
    flat = jnp.concatenate([rows, rows], axis=2).reshape(R, -1)
    half = flat[:, D:].reshape(R, D, 2 * D - 1)[:, :, :D]
    return half + jnp.swapaxes(half, 1, 2)


def _offsets(features: Features, matrix: Float[Array, "R D D"]) -> Float[Array, "R squares"]:
    """The inverse of `_matrix`."""
    R, D, _ = matrix.shape
    flat = jnp.pad(jnp.concatenate([matrix, matrix], axis=2).reshape(R, -1), [(0, 0), (0, D)])
    rows = flat.reshape(R, D, 2 * D + 1)[:, :, : D // 2 + 1] * _weights(features)[None, None]
    return jnp.swapaxes(rows, 1, 2).reshape(R, -1)[:, : features.squares]


def _size(features: Features, head_dim: int) -> int:
    """P of the op."""
    return head_dim * (head_dim + 1) // 2 + features.taylor * (1 + head_dim)


def _rows_in_padded(head_dim: int, features: Features) -> np.ndarray:
    """Where each feature of the op's head_dim is among those of the padded one."""
    first = features.taylor * (1 + features.head_dim)
    linear = np.arange(features.taylor * (1 + head_dim))
    return np.concatenate([linear, rows_in_padded(head_dim, features.head_dim, first)])
