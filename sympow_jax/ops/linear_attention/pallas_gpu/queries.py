"""What queries read, of the state before their chunk and of the keys in it, and its gradient.

A program has a tile of queries. phi(q) S = sum_r (q rot_r(q)) S_r, with rot_r(q)_i = q_((i + r) mod D), and the
gradient of phi(q) S dnum in q is sum_r rot_r(q) (S_r dnum) + rot_-r(q) rot_-r(S_r dnum). The rotation of the product is
that of the rows of S_r, which memory gives, while registers would have to be shuffled: one product more for each r.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_gpu.tiles import (
    F32,
    Grid,
    Ref,
    Tiles,
    call,
    decay,
    num_offsets,
    over_offsets,
    pairs,
    rotated,
    turned,
)
from sympow_jax.ops.linear_attention.pallas_shared import dot, inverse
from sympow_jax.typing import Array


def _forward_kernel(q, k, v, decays, s, z, out, den, *, kernel, tiles):
    (rows, D), Dv, dtype = q.shape, v.shape[1], q.dtype
    m, parts = pl.program_id(0), tiles.parts(D)

    def read(part, r, sums):
        num, total = sums
        phi = q[:, part].astype(F32) * rotated(q, pl.ds(0, rows), part, r)
        return num + dot(phi.astype(dtype), s[r, part], 1, 0), total + phi * z[r, part][None, :]

    sums = jnp.zeros((rows, Dv), F32), jnp.zeros((rows, D // len(parts)), F32)
    for part in parts:
        sums = over_offsets(D, functools.partial(read, part), sums)
    low, tokens = q[...], pl.ds(m * rows, rows)
    from_state = decay(decays, "from_state", tokens)

    def attend(j, sums):
        num, total = sums
        keys = pl.ds(j * tiles.step, tiles.step)
        scores = dot(low, k[keys, :], 1, 1)
        weights = kernel.weight(scores) * pairs(decays, tokens, keys, query_axis=0)
        return num + dot(weights.astype(dtype), v[keys, :], 1, 0), total + jnp.sum(weights, axis=1)

    num, total = sums
    sums = num * from_state[:, None], jnp.sum(total, axis=1) * from_state
    num, total = jax.lax.fori_loop(0, (m + 1) * (rows // tiles.step), attend, sums)
    out[...] = (num * inverse(total)[:, None]).astype(out.dtype)
    den[...] = total


def state_gradient(x: Ref, y: Array, s: Ref, part: slice, r: Array) -> Array:
    """The gradient of (x rot_r(x)) S_r . y in a part of x for a tile of tokens x and their y, [rows, entries]."""
    tokens, turned_back = pl.ds(0, x.shape[0]), s[r, turned(part, -r, x.shape[1])]
    there = rotated(x, tokens, part, r) * dot(y, s[r, part], 1, 1)
    return there + rotated(x, tokens, part, -r) * dot(y, turned_back, 1, 1)


def normaliser_gradient(x: Ref, y: Array | float, z: Ref, part: slice, r: Array) -> Array:
    """The same of (x rot_r(x)) z_r y, for numbers y [rows, 1]."""
    tokens, turned_back = pl.ds(0, x.shape[0]), z[r, turned(part, -r, x.shape[1])]
    there = rotated(x, tokens, part, r) * z[r, part][None, :]
    return y * (there + rotated(x, tokens, part, -r) * turned_back[None, :])


def _backward_kernel(q, k, v, decays, den, dnum, s, z, dq, dden, *, kernel, tiles):
    (rows, D), dtype = q.shape, q.dtype
    m, parts = pl.program_id(0), tiles.parts(D)
    dout, tokens = dnum[...], pl.ds(m * rows, rows)
    from_state = decay(decays, "from_state", tokens)

    def of_state(part):
        start = jnp.zeros((rows, part.stop - part.start), F32)
        return over_offsets(D, lambda r, dx: dx + state_gradient(q, dout, s, part, r), start)

    dx = [of_state(part) * from_state[:, None] for part in parts]
    low, steps = q[...], (m + 1) * (rows // tiles.step)

    def tile(j):
        """Keys, scores, their decays and the cotangents of the weights, but for that of the normaliser."""
        keys = pl.ds(j * tiles.step, tiles.step)
        decays_of_pairs = pairs(decays, tokens, keys, query_axis=0)
        return keys, dot(low, k[keys, :], 1, 1), decays_of_pairs, dot(dout, v[keys, :], 1, 1)

    def add(j, total):
        _, scores, decays_of_pairs, dweights = tile(j)
        return total + jnp.sum(kernel.weight(scores) * decays_of_pairs * dweights, axis=1)

    total = sum(0.5 * jnp.sum(q[:, part].astype(F32) * x, axis=1) for part, x in zip(parts, dx, strict=True))
    offset = -jax.lax.fori_loop(0, steps, add, total) * inverse(den[...])
    share = (offset * from_state)[:, None]

    def of_normaliser(part, dx):
        return over_offsets(D, lambda r, dx: dx + normaliser_gradient(q, share, z, part, r), dx)

    def attend(j, dx):
        keys, scores, decays_of_pairs, dweights = tile(j)
        dscores = ((dweights + offset[:, None]) * decays_of_pairs * kernel.derivative(scores)).astype(dtype)
        return [x + dot(dscores, k[keys, part], 1, 0) for part, x in zip(parts, dx, strict=True)]

    dx = [of_normaliser(part, x) for part, x in zip(parts, dx, strict=True)]
    for part, x in zip(parts, jax.lax.fori_loop(0, steps, attend, dx), strict=True):
        dq[:, part] = x.astype(dtype)
    dden[...] = offset


def forward(kernel: Kernel, tiles: Tiles, tokens: tuple[Array, ...], decays: Array, before: Any) -> Any:
    """(out [B, T, K, G, Dv], den [B, K, G, T]).

    Args:
      kernel: of degree 2.
      tiles: T is a multiple of the chunk.
      tokens: q [B, T, K, G, D], k [B, T, K, D], v [B, T, K, Dv].
      decays: [B, K, 8, T], see `decay_rows`.
      before: the states before each chunk, see `states`.
    """
    q, _, v = tokens
    B, T, K, G, D = q.shape
    Dv, O = v.shape[-1], num_offsets(D)
    grid = Grid(tiles, T, G, K, B)
    return call(
        "forward",
        functools.partial(_forward_kernel, kernel=kernel, tiles=tiles),
        grid.sizes,
        (*tokens, decays, *before),
        blocks=[
            grid.query_tile(D), grid.chunk(D), grid.chunk(Dv), grid.rows_chunk(),
            grid.state(O, D, Dv), grid.state(O, D),
        ],
        out=[((B, T, K, G, Dv), v.dtype, grid.query_tile(Dv)), ((B, K, G, T), F32, grid.query_row())],
        macs=B * T * K * G * (O * D * Dv + _keys_seen(tiles) * (D + Dv)),
    )  # fmt: skip


def backward(
    kernel: Kernel, tiles: Tiles, tokens: tuple[Array, ...], decays: Array, den: Array, dnum: Array, before: Any
) -> Any:
    """(dq, dden [B, K, G, T]) from den and the cotangent of the numerators [B, T, K, G, Dv], in the dtype of q.

    dden = -(num . dnum) / den has num . dnum as the products rounded it, so that the large terms of dq cancel.
    """
    q, _, v = tokens
    B, T, K, G, D = q.shape
    Dv, O = v.shape[-1], num_offsets(D)
    grid = Grid(tiles, T, G, K, B)
    return call(
        "backward_queries",
        functools.partial(_backward_kernel, kernel=kernel, tiles=tiles),
        grid.sizes,
        (*tokens, decays, den, dnum, *before),
        blocks=[
            grid.query_tile(D), grid.chunk(D), grid.chunk(Dv), grid.rows_chunk(), grid.query_row(),
            grid.query_tile(Dv), grid.state(O, D, Dv), grid.state(O, D),
        ],
        out=[(q.shape, q.dtype, grid.query_tile(D)), ((B, K, G, T), F32, grid.query_row())],
        macs=B * T * K * G * (2 * O * D * Dv + _keys_seen(tiles) * (3 * D + 2 * Dv)),
    )  # fmt: skip


def _keys_seen(tiles: Tiles) -> int:
    """Of a chunk by a query on average, in whole tiles."""
    return (tiles.chunk + tiles.rows) // 2
