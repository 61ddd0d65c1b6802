"""Softmax attention tile by tile: running maximum and sum, memory linear in T, a backward pass that recomputes.

Forward visits, for each query tile, the key tiles it can see (Rabe and Staats 2021; FlashAttention, arXiv
2205.14135); backward visits, for each key tile, the query tiles that see it. Biases and gates exist for one pair of
tiles at a time, and the parameters of a bias collect their gradient through its own VJP, pair by pair.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.loops import causal_pairs, expected_trips
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.ops.residuals import kept
from sympow_jax.ops.softmax_attention.inputs import Inputs, visible
from sympow_jax.ops.softmax_attention.tiles import Rows, cut, ranges, transposed_ranges
from sympow_jax.typing import accumulation_dtype

Sums = tuple[jax.Array, jax.Array, jax.Array]  # sum of w v, sum of w, maximum of the logits; w relative to it
QueryGradients = tuple[jax.Array, Any, Any]  # of q [N, B, K, G, C, D], before scaling, of its gates, of params
KeyGradients = tuple[jax.Array, jax.Array, Any]  # of k [M, B, K, D, C], before scaling, of v, of the gates of keys

_MASKED = -1e30  # a logit far below any other, but finite, so that differences of masked logits are not NaN


def blockwise(x: Inputs, *, scale: float, window: int | None, block_size: int) -> jax.Array:
    """The same function as `reference`, in tiles of block_size positions."""
    B, T, H, _ = x.q.shape
    q, k, v, q_rows, k_rows = cut(x, block_size)
    bias = x.bias
    if bias is not None and x.consecutive:
        bias = bias.on_consecutive(len(q) * block_size, block_size)
    function, params = (None, None) if bias is None else (bias.function, bias.params)
    gates = None if x.gates is None else (q_rows.gates.within, k_rows.gates.within)
    out: Any = _attend(scale, window, function, q, k, v, gates, params, q_rows, k_rows)  # [N, B, K, G, C, Dv]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, v.shape[-1])[:, :T]


def _tile_logits(q, k, q_tile: Rows, k_tile: Rows, bias, scale, window):
    """Masked logits of one pair of tiles, [B, K, G, C, C']. bias is None or [H or B H, C, C']."""
    dtype = accumulation_dtype(q, k)
    logits = _dot("bkgid,bkjd->bkgij", q, k, dtype) * scale
    if bias is not None:
        logits += bias.astype(dtype).reshape(-1, *q.shape[1:3], *bias.shape[-2:])
    if q_tile.gates is not None:
        shift = _shift(q_tile.gates, k_tile.gates)
        logits += (q_tile.gates.within + shift[..., None])[..., :, None] - k_tile.gates.within[..., None, :]
    segments = None if q_tile.segments is None else (q_tile.segments, k_tile.segments)
    mask = visible(q_tile.order, k_tile.order, segments, window)
    return jnp.where(mask[:, None, None], logits, _MASKED)


def _shift(q_gates, k_gates):
    """Log gates between the last tokens of two tiles, [B, K, G]."""
    (q_high, q_low), (k_high, k_low) = q_gates.last, k_gates.last
    return (q_high - k_high) + (q_low - k_low)


def _dot(equation, a, b, dtype):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, window, function, q, k, v, gates, params, q_rows, k_rows):
    return _forward(scale, window, function, q, k, v, gates, params, q_rows, k_rows)[0]


def _forward(scale, window, function, q, k, v, gates, params, q_rows, k_rows):
    del gates  # the same as in the rows; an argument of its own to have a gradient
    sums = add_keys(scale, window, function, empty_sums(q, v), q, k, v, params, q_rows, k_rows)
    out, lse = kept(finish(sums))
    # The backward needs the unrounded output: bfloat16 gradients of gates are sums that cancel.
    return out.astype(v.dtype), (q, k, v, params, q_rows, k_rows, out, lse)


def empty_sums(q, v) -> Sums:
    """The sums over no keys."""
    dtype, rows = accumulation_dtype(q, v), q.shape[:-1]
    return jnp.zeros((*rows, v.shape[-1]), dtype), jnp.zeros(rows, dtype), jnp.full(rows, _MASKED, dtype)


def add_keys(scale, window, function, sums: Sums, q, k, v, params, q_rows: Rows, k_rows: Rows) -> Sums:
    """The sums of every query tile, with the keys of these tiles in them too."""
    dtype = accumulation_dtype(q, k, v)
    pairs = causal_pairs(len(q), len(k), k.shape[3], window)

    def query_tile(_, args):
        sums_i, q_i, q_tile, first_i, last_i = args

        def key_tile(j, carry):
            out, total, row_max = carry
            k_j, v_j, k_tile = _take((k, v, k_rows), j)
            bias = _bias(function, params, q_tile, k_tile)
            logits = _tile_logits(q_i, k_j, q_tile, k_tile, bias, scale, window)
            new_max = jnp.maximum(row_max, logits.max(-1))
            weights = jnp.exp(logits - new_max[..., None])
            shrink = jnp.exp(row_max - new_max)
            update = _dot("bkgij,bkjd->bkgid", weights.astype(v.dtype), v_j, dtype)
            return out * shrink[..., None] + update, total * shrink + weights.sum(-1), new_max

        with expected_trips(pairs / len(q)):
            return None, jax.lax.fori_loop(first_i, last_i, key_tile, sums_i)

    return jax.lax.scan(query_tile, None, (sums, q, q_rows, *ranges(q_rows, k_rows, window)))[1]


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The outputs and the log-sum-exps of the rows.

    A row that sees nothing gets a log-sum-exp that makes every weight 0 when the backward recomputes them.
    """
    out, total, row_max = sums
    seen = row_max > 0.5 * _MASKED
    total = jnp.where(seen, total, 1.0)
    return jnp.where(seen[..., None], out / total[..., None], 0.0), jnp.where(seen, row_max + jnp.log(total), -_MASKED)


def _backward(scale, window, function, residuals, d_out):
    q, k, v, params, q_rows, k_rows, out, lse = residuals
    d_queries = empty_gradients(q, params, q_rows)
    sides = q, k, v, params, q_rows, k_rows
    d_queries, d_keys = add_gradients(scale, window, function, d_queries, sides, lse, row_dots(out, d_out), d_out)
    return gradients(scale, d_queries, d_keys, q, k, v)


def row_dots(out, d_out):
    """sum over the features of out d_out: what softmax subtracts from the gradient of every weight of a row."""
    return (out * d_out.astype(out.dtype)).sum(-1)


def empty_gradients(q, params, q_rows: Rows) -> QueryGradients:
    """Gradients of queries, their gates and the bias from no keys."""
    dtype = accumulation_dtype(q)
    d_gates = None if q_rows.gates is None else jnp.zeros(q.shape[:-1], dtype)
    return jnp.zeros(q.shape, dtype), d_gates, jax.tree.map(jnp.zeros_like, params)


def add_gradients(
    scale, window, function, d_queries: QueryGradients, sides, lse, delta, d_out
) -> tuple[QueryGradients, KeyGradients]:
    """The gradients of queries with those from these keys added, and the gradients of the keys.

    `sides` are (q, k, v, params, q_rows, k_rows); lse, delta (see `row_dots`) and d_out are of the rows, all keys in.
    """
    q, k, v, params, q_rows, k_rows = sides
    dtype = accumulation_dtype(q, k, v)
    pairs = causal_pairs(len(q), len(k), k.shape[3], window)

    def key_tile(carry, args):
        k_j, v_j, k_tile, first_j, last_j = args

        def query_tile(i, carry):
            d_q, d_q_gates, d_params, d_k, d_v, d_gates = carry
            q_i, q_tile, lse_i, delta_i, d_out_i = _take((q, q_rows, lse, delta, d_out), i)
            bias, pull = jax.vjp(lambda p: _bias(function, p, q_tile, k_tile), params)
            logits = _tile_logits(q_i, k_j, q_tile, k_tile, bias, scale, window)
            weights = jnp.exp(logits - lse_i[..., None])
            d_weights = _dot("bkgid,bkjd->bkgij", d_out_i, v_j, dtype)
            d_logits = weights * (d_weights - delta_i[..., None])
            d_v += _dot("bkgid,bkgij->bkdj", d_out_i, weights.astype(v.dtype), dtype)
            cast = d_logits.astype(q.dtype)
            d_k += _dot("bkgid,bkgij->bkdj", q_i, cast, dtype)
            d_q = d_q.at[i].add(_dot("bkgij,bkjd->bkgid", cast, k_j, dtype))
            if d_gates is not None:
                d_gates -= d_logits.sum(-2)
                d_q_gates = d_q_gates.at[i].add(d_logits.sum(-1))
            if bias is not None:
                d_bias = d_logits.reshape(d_logits.shape[0], -1, *d_logits.shape[-2:])
                if bias.ndim == 3:  # shared by the batch; term by term, as XLA's CPU reduction over it is 50x slower
                    d_bias = functools.reduce(jnp.add, d_bias)
                d_params = jax.tree.map(jnp.add, d_params, pull(d_bias.astype(bias.dtype))[0])
            return d_q, d_q_gates, d_params, d_k, d_v, d_gates

        zeros = partial(jnp.zeros, dtype=dtype)
        d_gates = None if k_rows.gates is None else zeros(k_tile.gates.within.shape)
        # [B, K, D, C']: with features first, XLA's CPU products are twice as fast as with keys first.
        carry = (*carry, zeros(k_j.mT.shape), zeros(v_j.mT.shape), d_gates)
        with expected_trips(pairs / len(k)):
            *carry, d_k, d_v, d_gates = jax.lax.fori_loop(first_j, last_j, query_tile, carry)
        return tuple(carry), (d_k, d_v, d_gates)

    return jax.lax.scan(key_tile, d_queries, (k, v, k_rows, *transposed_ranges(q_rows, k_rows, window)))


def gradients(scale, d_queries: QueryGradients, d_keys: KeyGradients, q, k, v):
    """Those of q, k, v, gates, params and the rows of both sides, rounded where the arguments are."""
    (d_q, d_q_gates, d_params), (d_k, d_v, d_gates) = d_queries, d_keys
    # Row sums are 0 in exact arithmetic; kept, rounding cancels for pairs on the same side of a gate.
    d_gates = None if d_q_gates is None else (d_q_gates, d_gates)
    d_q, d_k = (d_q * scale).astype(q.dtype), (d_k.mT * scale).astype(k.dtype)
    return d_q, d_k, d_v.mT.astype(v.dtype), d_gates, d_params, None, None


_attend.defvjp(_forward, _backward)


def _bias(function: Callable | None, params, q_tile: Rows, k_tile: Rows) -> jax.Array | None:
    if function is None:
        return None
    return PositionBias(params, function)(q_tile.positions, k_tile.positions)


def _take(tree, index):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)
