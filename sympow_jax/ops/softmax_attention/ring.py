"""Softmax attention whose keys travel: each device holds a part of a sequence and the keys of one part at a time.

Ring attention (Liu et al., arXiv 2310.01889) in the tiles of `blockwise`: keys, values and what belongs to them go from
device to device, and the running maximum and sum of each query goes on with those that arrive. Forward keeps outputs
and log-sum-exps; backward sends the keys around again, with their gradients behind them, and recomputes the weights.
What a step computes and what it sends do not wait for each other.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.softmax_attention.blockwise import gates_within, joined, sinks_of
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.ops.softmax_attention.tile_sums import (
    Form,
    Tiles,
    Weights,
    add_gradients,
    add_keys,
    empty_gradients,
    first_sums,
    gradients,
)
from sympow_jax.ops.softmax_attention.tiles import cut
from sympow_jax.typing import PyTree


def ring(x: Inputs, *, axis: str, weights: Weights, scale: float, window: int | None, block_size: int) -> jax.Array:
    """`blockwise` of the queries in x with the keys of all devices along a mesh axis; inside shard_map.

    Order and positions are those in the whole sequence, and gates its cumulative ones; every device has as many tokens.
    """
    q, k, v, q_rows, k_rows = cut(x, block_size)
    bias = x.bias_on(jax.lax.axis_size(axis) * x.q.shape[1], block_size)
    function, params = (None, None) if bias is None else (bias.function, bias.params)
    form, tiles = Form(weights, scale, window, function), Tiles(q, k, v, params, q_rows, k_rows, sinks_of(x))
    return joined(_ring(axis, form, gates_within(q_rows, k_rows), tiles), x)


def pass_on(axis: str, tree: PyTree) -> PyTree:
    """What the device before this one holds, on a ring along the axis."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(p, (p + 1) % size) for p in range(size)])


def _with_keys(x: Tiles, keys: PyTree) -> Tiles:
    return dataclasses.replace(x, k=keys[0], v=keys[1], k_rows=keys[2])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(axis: str, form: Form, gates: Any, x: Tiles) -> jax.Array:
    return _forward(axis, form, gates, x)[0]


def _forward(axis, form, gates, x):
    del gates  # as in `blockwise`

    def step(carry, _):
        keys, sums = carry
        following = pass_on(axis, keys)
        return (following, add_keys(form, sums, _with_keys(x, keys))), None

    start = (x.k, x.v, x.k_rows), first_sums(form, x)
    (_, sums), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axis))
    out, residuals = form.weights.finish(sums, x.v.dtype)
    return out, (x, residuals)


def _backward(axis, form, saved, d_out):
    x, residuals = saved
    rows = form.weights.rows(residuals, d_out)

    def step(carry, _):
        keys, d_before, d_queries = carry
        following, d_before = pass_on(axis, keys), pass_on(axis, d_before)
        d_queries, d_keys = add_gradients(form, d_queries, _with_keys(x, keys), rows, d_out)
        return (following, jax.tree.map(jnp.add, d_before, d_keys), d_queries), None

    d_queries = empty_gradients(x)
    nothing = partial(jnp.zeros, dtype=d_queries[0].dtype)
    d_gates = None if x.k_rows.gates is None else nothing(x.k_rows.gates.within.shape)
    start = (x.k, x.v, x.k_rows), (nothing(x.k.mT.shape), nothing(x.v.mT.shape), d_gates), d_queries
    (_, d_keys, d_queries), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axis))
    return gradients(form, x, rows, d_queries, pass_on(axis, d_keys))


_ring.defvjp(_forward, _backward)
