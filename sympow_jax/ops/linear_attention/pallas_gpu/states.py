"""The states between chunks: one program for each offset of a row walks over its tokens, the state in registers.

Forward, keys and values leave states to the chunks after theirs; backwards, the same sums of queries and cotangents
are the cotangents of the states that chunks before theirs left. What is stored has the weight of the products on its
side, 1 for r = 0 and r = D / 2 and 2 in between, so that reading it needs none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.pallas_gpu.tiles import (
    F32,
    ROWS,
    Tiles,
    call,
    decay,
    num_offsets,
    rotated,
)
from sympow_jax.ops.linear_attention.pallas_shared import DECAYS, dot
from sympow_jax.typing import Array


def offset_weights(head_dim: int) -> np.ndarray:
    """Of the products x_i x_(i + r), all i, in (x . y)^2."""
    weights = np.full(num_offsets(head_dim), 2.0, np.float32)
    weights[[0, -1]] = 1.0
    return weights


def _kernel(x, y, last, decays, s0, z0, before, z_before, s, z, *, tiles, weight, backwards):
    r, (T, G, D) = pl.program_id(0), x.shape
    rows, chunks = tiles.step, T // tiles.chunk
    pair = (1 + jnp.minimum(r * (D // 2 - r), 1)).astype(F32)  # the weight: arithmetic, as a loop takes no selection

    def add(start, g, sums):
        state, normaliser = sums
        tokens = pl.ds(start, rows)
        phi = pair * x[tokens, g, :].astype(F32) * rotated(x, tokens, slice(0, D), r, g)
        phi *= decay(decays, weight, tokens)[:, None]
        state += dot(phi.astype(y.dtype), y[tokens, g, :], 0, 0)
        return state, normaliser + phi * last[g, tokens][:, None]

    def one_chunk(t, carried):
        n = chunks - 1 - t if backwards else t
        state, normaliser = carried
        before[n] = state.astype(before.dtype)
        z_before[n] = normaliser
        carry = decays[ROWS.index("carry"), n * tiles.chunk]

        def tile(m, sums):
            start = n * tiles.chunk + m * rows
            return jax.lax.fori_loop(0, G, lambda g, sums: add(start, g, sums), sums)

        sums = carry * state, jnp.zeros((rows, D), F32)
        state, added = jax.lax.fori_loop(0, tiles.chunk // rows, tile, sums)
        return state, carry * normaliser + jnp.sum(added, axis=0)

    s[...], z[...] = jax.lax.fori_loop(0, chunks, one_chunk, (s0[...], z0[...]))


def states(
    tiles: Tiles, x: Array, y: Array, last: Array, decays: Array, start: tuple[Array, Array], *, backwards: bool = False
) -> Any:
    """(S [B, K, N, O, D, Dv], z [B, K, N, O, D], S after all chunks, z after all chunks), O offsets.

    S, in the dtype of y, and z are those before each chunk; backwards, after it, and S and z after all are those
    before the first chunk. `_kernel` keeps them in float32.

    Args:
      tiles: T is a multiple of the chunk.
      x: [B, T, K, G, D], what is expanded: keys with G = 1, or queries.
      y: [B, T, K, G, Dv], values, or the cotangents of the numerators.
      last: [B, K, G, T], float32, one more value for z: 1, or the cotangents of the normalisers.
      decays: [B, K, 8, T], see `decay_rows`.
      start: S [B, K, O, D, Dv] and z [B, K, O, D] before the first chunk, or after the last, float32.
    """
    B, T, K, G, D = x.shape
    Dv, N, offsets = y.shape[-1], T // tiles.chunk, num_offsets(x.shape[-1])

    def tokens(size):
        return pl.BlockSpec((None, T, None, G, size), lambda r, h, b: (b, 0, h, 0, 0))

    def rows(count):
        return pl.BlockSpec((None, None, count, T), lambda r, h, b: (b, h, 0, 0))

    def one(*shape):
        return pl.BlockSpec((None, None, None, *shape), lambda r, h, b: (b, h, r, *(0,) * len(shape)))

    def each(*shape):
        return pl.BlockSpec((None, None, N, None, *shape), lambda r, h, b: (b, h, 0, r, *(0,) * len(shape)))

    return call(
        "states_backward" if backwards else "states",
        functools.partial(_kernel, tiles=tiles, weight="from_state" if backwards else "to_state", backwards=backwards),
        (offsets, K, B),
        (x, y, last, decays, *start),
        blocks=[tokens(D), tokens(Dv), rows(G), rows(DECAYS), one(D, Dv), one(D)],
        out=[
            ((B, K, N, offsets, D, Dv), y.dtype, each(D, Dv)),
            ((B, K, N, offsets, D), F32, each(D)),
            ((B, K, offsets, D, Dv), F32, one(D, Dv)),
            ((B, K, offsets, D), F32, one(D)),
        ],
        macs=B * K * G * T * offsets * D * Dv,
    )
