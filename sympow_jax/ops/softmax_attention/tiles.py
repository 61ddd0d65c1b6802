"""Cuts attention inputs into tiles of C positions, and says which pairs of tiles have visible entries."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Everything that tiles carry besides q, k and v: N query tiles and M key tiles of C positions.

    Attributes:
      q_gates: None or (high, low), each [N, B, K, G, C]; k_gates: the same at the keys, [M, B, K, G, C].
      q_positions, k_positions: [N, C], [M, C] or [N, B, C], [M, B, C].
      q_order, k_order: [N, b, C], [M, b, C]; padding is -1, which neither sees nor is seen.
      segments: None or ([N, B, C], [M, B, C]).
    """

    q_gates: PyTree
    k_gates: PyTree
    q_positions: PyTree
    k_positions: PyTree
    q_order: PyTree
    k_order: PyTree
    segments: PyTree


def cut(x: Inputs, size: int) -> tuple[jax.Array, jax.Array, jax.Array, Tiles]:
    """Returns q [N, B, K, G, C, D], k [M, B, K, C, D], v [M, B, K, C, Dv] and the rest."""
    B, T, H, D = x.q.shape
    K = x.k.shape[2]
    q = _tile(x.q.reshape(B, T, K, H // K, D), 1, size).transpose(1, 0, 3, 4, 2, 5)
    k, v = (_tile(a, 1, size).transpose(1, 0, 3, 2, 4) for a in (x.k, x.v))

    def heads(gates):  # [B, T, H] -> [N, B, K, G, C]
        return _tile(gates.reshape(*gates.shape[:2], K, H // K), 1, size, mode="edge").transpose(1, 0, 3, 4, 2)

    def rows(a, **pad):  # [..., T] -> [N, ..., C]
        return jnp.moveaxis(_tile(a, a.ndim - 1, size, **pad), -2, 0)

    q_gates, k_gates = (None, None) if x.gates is None else jax.tree.map(heads, x.gates)
    return (
        q,
        k,
        v,
        Tiles(
            q_gates=q_gates,
            k_gates=k_gates,
            q_positions=rows(x.q_positions, mode="edge"),
            k_positions=rows(x.k_positions, mode="edge"),
            q_order=rows(x.q_order, constant_values=-1),
            k_order=rows(x.k_order, constant_values=-1),
            segments=None if x.segments is None else jax.tree.map(rows, x.segments),
        ),
    )


def _tile(x: jax.Array, axis: int, size: int, **pad) -> jax.Array:
    """Splits an axis into tiles, [..., T, ...] -> [..., N, C, ...], padding its end."""
    count = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - x.shape[axis])
    return jnp.pad(x, widths, **pad).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def ranges(tiles: Tiles, window: int | None) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The key tiles [first, last) that each query tile must visit, and the query tiles that each key tile must.

    From the extremes of positions and segment ids in each tile, so windows, packed documents and unwritten cache
    slots cost nothing, whether or not they are known before the program runs.
    """
    far = jnp.iinfo(jnp.int32).max
    q, k = tiles.q_order, tiles.k_order
    q_last, k_last = q.max((1, 2)), k.max((1, 2))
    q_first, k_first = (jnp.where(a >= 0, a, far).min((1, 2)) for a in (q, k))
    meets = (k_first[None, :] <= q_last[:, None]) & (k_last >= 0)[None, :]
    if window is not None:
        meets &= q_first[:, None] - k_last[None, :] < window
    if tiles.segments is not None:
        (q_low, q_high), (k_low, k_high) = ((jnp.where(s > 0, s, far).min(2), s.max(2)) for s in tiles.segments)
        overlap = (k_low[None] <= q_high[:, None]) & (q_low[:, None] <= k_high[None])
        meets &= overlap.any(2)
    return _span(meets), _span(meets.T)


def _span(meets: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = jnp.argmax(meets, 1)
    last = meets.shape[1] - jnp.argmax(meets[:, ::-1], 1)
    return first, jnp.where(meets.any(1), last, first)
