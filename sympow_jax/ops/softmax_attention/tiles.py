"""Cuts attention inputs into tiles of C positions, and says which pairs of tiles have visible entries."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileGates:
    """Cumulative log gates of N tiles, single floats for each token: two floats of each would be added up pair by pair.

    Attributes:
      within: relative to the last token of the tile, [N, B, K, G, C]; the gradient goes through it alone.
      last: of that token, in two floats (high, low), each [N, B, K, G].
    """

    within: PyTree
    last: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the N tiles of C queries, or of C keys, carry besides their vectors; one tile of it has no N.

    Attributes:
      gates: None or TileGates.
      positions: [N, C] or [N, B, C], for the bias.
      order: [N, b, C], for visibility; padding is -1, which neither sees nor is seen.
      segments: None or [N, B, C].
    """

    gates: PyTree
    positions: PyTree
    order: PyTree
    segments: PyTree


def cut(x: Inputs, size: int) -> tuple[jax.Array, jax.Array, jax.Array, Rows, Rows]:
    """Returns q [N, B, K, G, C, D], k [M, B, K, C, D], v [M, B, K, C, Dv], and the rows of queries and keys."""
    B, T, H, D = x.q.shape
    K = x.k.shape[2]
    q = _tile(x.q.reshape(B, T, K, H // K, D), 1, size).transpose(1, 0, 3, 4, 2, 5)
    k, v = (_tile(a, 1, size).transpose(1, 0, 3, 2, 4) for a in (x.k, x.v))

    def heads(gates):  # [B, T, H] -> [N, B, K, G, C]
        return _tile(gates.reshape(*gates.shape[:2], K, H // K), 1, size, mode="edge").transpose(1, 0, 3, 4, 2)

    def tile_gates(gates):
        high, low = (heads(part) for part in gates)
        last = jax.lax.stop_gradient((high[..., -1], low[..., -1]))
        return TileGates((high - last[0][..., None]) + (low - last[1][..., None]), last)

    def last(a, **pad):  # [..., T] -> [N, ..., C]
        return jnp.moveaxis(_tile(a, a.ndim - 1, size, **pad), -2, 0)

    def rows(gates, positions, order, segments):
        return Rows(
            gates=None if gates is None else tile_gates(gates),
            positions=last(positions, mode="edge"),
            order=last(order, constant_values=-1),
            segments=None if segments is None else last(segments),
        )

    q_gates, k_gates = (None, None) if x.gates is None else x.gates
    q_segments, k_segments = (None, None) if x.segments is None else x.segments
    q_rows = rows(q_gates, x.q_positions, x.q_order, q_segments)
    return q, k, v, q_rows, rows(k_gates, x.k_positions, x.k_order, k_segments)


def _tile(x: jax.Array, axis: int, size: int, **pad) -> jax.Array:
    """Splits an axis into tiles, [..., T, ...] -> [..., N, C, ...], padding its end."""
    count = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - x.shape[axis])
    return jnp.pad(x, widths, **pad).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def ranges(q_rows: Rows, k_rows: Rows, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The key tiles [first, last) that each of the N query tiles must visit.

    From the extremes of order and segment ids in each tile, so windows, packed documents and unwritten cache slots
    cost nothing, whether or not they are known before the program runs.
    """
    return _span(_meets(q_rows, k_rows, window))


def transposed_ranges(q_rows: Rows, k_rows: Rows, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The query tiles [first, last) that each of the M key tiles must visit."""
    return _span(_meets(q_rows, k_rows, window).T)


def _meets(q_rows: Rows, k_rows: Rows, window: int | None) -> jax.Array:
    """Which pairs of tiles may have a visible entry, [N, M]."""
    far = jnp.iinfo(jnp.int32).max
    q, k = q_rows.order, k_rows.order
    q_last, k_last = q.max((1, 2)), k.max((1, 2))
    q_first, k_first = (jnp.where(a >= 0, a, far).min((1, 2)) for a in (q, k))
    meets = (k_first[None, :] <= q_last[:, None]) & (k_last >= 0)[None, :]
    if window is not None:
        meets &= q_first[:, None] - k_last[None, :] < window
    if q_rows.segments is not None:
        (q_low, q_high), (k_low, k_high) = (
            (jnp.where(s > 0, s, far).min(2), s.max(2)) for s in (q_rows.segments, k_rows.segments)
        )
        overlap = (k_low[None] <= q_high[:, None]) & (q_low[:, None] <= k_high[None])
        meets &= overlap.any(2)
    return meets


def _span(meets: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = jnp.argmax(meets, 1)
    last = meets.shape[1] - jnp.argmax(meets[:, ::-1], 1)
    return first, jnp.where(meets.any(1), last, first)
