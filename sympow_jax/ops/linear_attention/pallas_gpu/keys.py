"""The gradients of keys, values and gates, from the queries of their chunk and the cotangents of the state after it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_gpu.queries import normaliser_gradient, state_gradient
from sympow_jax.ops.linear_attention.pallas_gpu.tiles import (
    F32,
    Grid,
    Tiles,
    call,
    decay,
    num_offsets,
    over_offsets,
    pairs,
    rotated,
)
from sympow_jax.ops.linear_attention.pallas_shared import dot
from sympow_jax.typing import Array


def _of_state(k, v, decays, ds, dz, tiles):
    """Of a tile, from the cotangent of the state after its chunk: dk in parts, dv and what their decay multiplies."""
    (rows, D), dtype, parts = k.shape, k.dtype, tiles.parts(k.shape[1])
    values = v[...]

    def of_keys(part):
        def add(r, dk):
            return dk + state_gradient(k, values, ds, part, r) + normaliser_gradient(k, 1.0, dz, part, r)

        return over_offsets(D, add, jnp.zeros((rows, part.stop - part.start), F32))

    def of_values(part, r, dv):
        phi = k[:, part].astype(F32) * rotated(k, pl.ds(0, rows), part, r)
        return dv + dot(phi.astype(dtype), ds[r, part], 1, 0)

    dk, dv = [of_keys(part) for part in parts], jnp.zeros(v.shape, F32)
    for part in parts:
        dv = over_offsets(D, functools.partial(of_values, part), dv)
    to_state = decay(decays, "to_state", pl.ds(pl.program_id(0) * rows, rows))
    value = sum(0.5 * jnp.sum(k[:, part].astype(F32) * dx, axis=1) for part, dx in zip(parts, dk, strict=True))
    return [dx * to_state[:, None] for dx in dk], dv * to_state[:, None], value * to_state


def _store(sums, parts, dk, dv, dgate):
    dx, dvalues, dlog = sums
    for part, x in zip(parts, dx, strict=True):
        dk[:, part] = x.astype(dk.dtype)
    dv[...], dgate[...] = dvalues.astype(dv.dtype), -dlog


def _kernel(q, k, v, decays, dnum, dden, ds, dz, dk, dv, dgate, *, kernel, tiles):
    (rows, D), dtype, G, step = k.shape, k.dtype, q.shape[1], tiles.step
    m, parts = pl.program_id(0), tiles.parts(D)
    sums = _of_state(k, v, decays, ds, dz, tiles)
    keys, values, tokens = k[...], v[...], pl.ds(m * rows, rows)

    def attend(i, g, sums):
        dx, dvalues, dlog = sums
        at = pl.ds(i * step, step)
        queries, dout = q[at, g, :], dnum[at, g, :]
        scores = dot(keys, queries, 1, 1)
        decays_of_pairs = pairs(decays, at, tokens, query_axis=1)
        dweights = dot(values, dout, 1, 1) + dden[g, at][None, :]
        weights = kernel.weight(scores) * decays_of_pairs
        dscores = (dweights * decays_of_pairs * kernel.derivative(scores)).astype(dtype)
        dx = [x + dot(dscores, q[at, g, part], 1, 0) for part, x in zip(parts, dx, strict=True)]
        dvalues += dot(weights.astype(dtype), dout, 1, 0)
        return dx, dvalues, dlog + jnp.sum(weights * dweights, axis=1)

    def tile(i, sums):
        return jax.lax.fori_loop(0, G, lambda g, sums: attend(i, g, sums), sums)

    _store(jax.lax.fori_loop(m * (rows // step), tiles.chunk // step, tile, sums), parts, dk, dv, dgate)


def _kernel_of_state(k, v, decays, ds, dz, dk, dv, dgate, *, tiles):
    _store(_of_state(k, v, decays, ds, dz, tiles), tiles.parts(k.shape[1]), dk, dv, dgate)


def backward(
    kernel: Kernel,
    tiles: Tiles,
    tokens: tuple[Array, ...],
    decays: Array,
    dnum: Array,
    dden: Array,
    dafter: Any,
) -> Any:
    """(dk, dv, dgates [B, K, T]) from the cotangents of numerators and normalisers and those of `states` backwards.

    dgates is the gradient of the cumulative log gates, without what the final state adds at the end.
    """
    q, k, v = tokens
    B, T, K, G, D = q.shape
    Dv, O = v.shape[-1], num_offsets(D)
    grid = Grid(tiles, T, 1, K, B)
    seen = (tiles.chunk + tiles.rows) // 2
    return call(
        "backward_keys",
        functools.partial(_kernel, kernel=kernel, tiles=tiles),
        grid.sizes,
        (*tokens, decays, dnum, dden, *dafter),
        blocks=[
            grid.queries_chunk(G, D), grid.tile(D), grid.tile(Dv), grid.rows_chunk(), grid.queries_chunk(G, Dv),
            grid.rows_chunk(G), grid.state(O, D, Dv), grid.state(O, D),
        ],
        out=_results(grid, k, v),
        macs=B * T * K * (3 * O * D * Dv + G * seen * 2 * (D + Dv)),
    )  # fmt: skip


def backward_of_state(tiles: Tiles, tokens: tuple[Array, Array], decays: Array, dafter: Any) -> Any:
    """The same of a state that no query reads."""
    k, v = tokens
    (B, T, K, D), Dv = k.shape, v.shape[-1]
    O = num_offsets(D)
    grid = Grid(tiles, T, 1, K, B)
    return call(
        "state_backward",
        functools.partial(_kernel_of_state, tiles=tiles),
        grid.sizes,
        (*tokens, decays, *dafter),
        blocks=[grid.tile(D), grid.tile(Dv), grid.rows_chunk(), grid.state(O, D, Dv), grid.state(O, D)],
        out=_results(grid, k, v),
        macs=B * T * K * 3 * O * D * Dv,
    )


def _results(grid: Grid, k: Array, v: Array) -> list[Any]:
    rows = (k.shape[0], k.shape[2], k.shape[1])
    return [
        (k.shape, k.dtype, grid.tile(k.shape[-1])),
        (v.shape, v.dtype, grid.tile(v.shape[-1])),
        (rows, F32, grid.row()),
    ]
