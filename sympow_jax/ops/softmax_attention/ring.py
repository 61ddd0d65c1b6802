"""Softmax attention whose keys travel: each device holds a part of a sequence and the keys of one part at a time.

Ring attention (Liu et al., arXiv 2310.01889) in the tiles of `blockwise`: keys, values and what belongs to them go from
device to device, and the running maximum and sum of each query goes on with those that arrive. Forward keeps outputs
and log-sum-exps; backward sends the keys around again, with their gradients behind them, and recomputes the weights.
What a step computes and what it sends do not wait for each other.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.residuals import kept
from sympow_jax.ops.softmax_attention.blockwise import (
    add_gradients,
    add_keys,
    empty_gradients,
    empty_sums,
    finish,
    gradients,
    row_dots,
)
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.ops.softmax_attention.tiles import cut
from sympow_jax.typing import PyTree


def ring(x: Inputs, *, axis: str, scale: float, window: int | None, block_size: int) -> jax.Array:
    """`blockwise` of the queries in x with the keys of all devices along a mesh axis; inside shard_map.

    Order and positions are those in the whole sequence, and gates its cumulative ones; every device has as many tokens.
    """
    B, T, H, _ = x.q.shape
    q, k, v, q_rows, k_rows = cut(x, block_size)
    function, params = (None, None) if x.bias is None else (x.bias.function, x.bias.params)
    gates = None if x.gates is None else (q_rows.gates.within, k_rows.gates.within)
    out: Any = _ring(axis, scale, window, function, q, k, v, gates, params, q_rows, k_rows)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, v.shape[-1])[:, :T]


def pass_on(axis: str, tree: PyTree) -> PyTree:
    """What the device before this one holds, on a ring along the axis."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(p, (p + 1) % size) for p in range(size)])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ring(axis, scale, window, function, q, k, v, gates, params, q_rows, k_rows):
    return _forward(axis, scale, window, function, q, k, v, gates, params, q_rows, k_rows)[0]


def _forward(axis, scale, window, function, q, k, v, gates, params, q_rows, k_rows):
    del gates  # as in `blockwise`

    def step(carry, _):
        (k_now, v_now, rows_now), sums = carry
        following = pass_on(axis, carry[0])
        return (following, add_keys(scale, window, function, sums, q, k_now, v_now, params, q_rows, rows_now)), None

    start = (k, v, k_rows), empty_sums(q, v)
    (_, sums), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axis))
    out, lse = kept(finish(sums))
    return out.astype(v.dtype), (q, k, v, params, q_rows, k_rows, out, lse)


def _backward(axis, scale, window, function, residuals, d_out):
    q, k, v, params, q_rows, k_rows, out, lse = residuals
    delta = row_dots(out, d_out)

    def step(carry, _):
        (k_now, v_now, rows_now), d_before, d_queries = carry
        following, d_before = pass_on(axis, carry[0]), pass_on(axis, d_before)
        sides = q, k_now, v_now, params, q_rows, rows_now
        d_queries, d_keys = add_gradients(scale, window, function, d_queries, sides, lse, delta, d_out)
        return (following, jax.tree.map(jnp.add, d_before, d_keys), d_queries), None

    nothing = partial(jnp.zeros, dtype=lse.dtype)
    d_gates = None if k_rows.gates is None else nothing(k_rows.gates.within.shape)
    start = (k, v, k_rows), (nothing(k.mT.shape), nothing(v.mT.shape), d_gates), empty_gradients(q, params, q_rows)
    (_, d_keys, d_queries), _ = jax.lax.scan(step, start, None, length=jax.lax.axis_size(axis))
    return gradients(scale, d_queries, pass_on(axis, d_keys), q, k, v)


_ring.defvjp(_forward, _backward)
