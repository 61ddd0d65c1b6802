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


def _of_state(k, v, decays, ds, dz):
    """Of a tile, from the cotangent of the state after its chunk: dk, dv and what their decay multiplies."""
    (rows, D), dtype = k.shape, k.dtype
    values = v[...]

    def of_keys(r, dk):
        return dk + state_gradient(k, values, ds, r) + normaliser_gradient(k, 1.0, dz, r)

    def of_values(r, dv):
        phi = k[...].astype(F32) * rotated(k, 0, rows, r)
        return dv + dot(phi.astype(dtype), ds[r], 1, 0)

    dk = over_offsets(D, of_keys, jnp.zeros((rows, D), F32))
    dv = over_offsets(D, of_values, jnp.zeros(v.shape, F32))
    to_state = decay(decays, "to_state", pl.program_id(0) * rows, rows)
    value = 0.5 * jnp.sum(k[...].astype(F32) * dk, axis=1)
    return dk * to_state[:, None], dv * to_state[:, None], value * to_state


def _kernel(q, k, v, decays, dnum, dden, ds, dz, dk, dv, dgate, *, kernel, tiles):
    (rows, _), dtype, G = k.shape, k.dtype, q.shape[1]
    m = pl.program_id(0)
    sums = _of_state(k, v, decays, ds, dz)
    keys, values = k[...], v[...]

    def attend(i, g, sums):
        dx, dvalues, dlog = sums
        at = pl.ds(i * rows, rows)
        queries, dout = q[at, g, :], dnum[at, g, :]
        scores = dot(keys, queries, 1, 1)
        decays_of_pairs = pairs(decays, i * rows, m * rows, rows, query_axis=1)
        dweights = dot(values, dout, 1, 1) + dden[g, at][None, :]
        weights = kernel.weight(scores) * decays_of_pairs
        dscores = dweights * decays_of_pairs * kernel.derivative(scores)
        dx += dot(dscores.astype(dtype), queries, 1, 0)
        dvalues += dot(weights.astype(dtype), dout, 1, 0)
        return dx, dvalues, dlog + jnp.sum(weights * dweights, axis=1)

    def tile(i, sums):
        return jax.lax.fori_loop(0, G, lambda g, sums: attend(i, g, sums), sums)

    dx, dvalues, dlog = jax.lax.fori_loop(m, tiles.chunk // rows, tile, sums)
    dk[...], dv[...], dgate[...] = dx.astype(dtype), dvalues.astype(dtype), -dlog


def _kernel_of_state(k, v, decays, ds, dz, dk, dv, dgate):
    dx, dvalues, dlog = _of_state(k, v, decays, ds, dz)
    dk[...], dv[...], dgate[...] = dx.astype(k.dtype), dvalues.astype(k.dtype), -dlog


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
        tiles,
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
        _kernel_of_state,
        tiles,
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
