"""Sums over tiles of keys and their gradients: the loops that `blockwise`, and rings of devices, consist of.

Forward visits, for each query tile, the key tiles it can see (Rabe and Staats 2021; FlashAttention, arXiv
2205.14135); backward visits, for each key tile, the query tiles that see it. Biases and gates exist for one pair of
tiles at a time, and the parameters of a bias collect their gradient through its own VJP, pair by pair.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sympow_jax.ops.loops import causal_pairs, expected_trips
from sympow_jax.ops.positions.position_bias import Function, PositionBias
from sympow_jax.ops.residuals import kept
from sympow_jax.ops.softmax_attention.inputs import visible
from sympow_jax.ops.softmax_attention.tiles import Rows, ranges, transposed_ranges
from sympow_jax.typing import accumulation_dtype

Sums = tuple[jax.Array, ...]
Extend = Callable[[jax.Array], jax.Array]  # adds bias and gates to scores, and masks what is not visible
QueryGradients = tuple[jax.Array, Any, Any]  # of q [N, B, K, G, C, D], before scaling, of its gates, of params
KeyGradients = tuple[jax.Array, jax.Array, Any]  # of k [M, B, K, D, C], before scaling, of v, of the gates of keys

MASKED = -1e30  # a logit far below any other, but finite, so that differences of masked logits are not NaN


@runtime_checkable
class Weights(Protocol):
    """How scores become weights, and what is summed of them; hashable, as compiled programs are made for it."""

    def empty(self, q: jax.Array, v: jax.Array) -> Sums:
        """The sums of all rows over no keys."""
        ...

    def add(self, sums: Sums, scores: jax.Array, extend: Extend, v: jax.Array) -> Sums:
        """The sums of a query tile with the keys of a tile in them too."""
        ...

    def finish(self, sums: Sums, dtype: Any) -> tuple[jax.Array, Any]:
        """The output, and what `rows` needs of it."""
        ...

    def rows(self, residuals: Any, d_out: jax.Array) -> Any:
        """What `pull` needs of each row, [N, B, K, G, C]."""
        ...

    def pull(self, scores: jax.Array, extend: Extend, rows: Any, d_weights: jax.Array) -> tuple[jax.Array, ...]:
        """The weights of a pair of tiles again, and the gradients of the scores and of what was added to them."""
        ...


@dataclasses.dataclass(frozen=True)
class Softmax:
    """exp(score), divided by its sum; the sums are those of w v and of w relative to the row's maximum, and that."""

    def empty(self, q, v):
        """See `Weights`, as for the others."""
        dtype, rows = accumulation_dtype(q, v), q.shape[:-1]
        return jnp.zeros((*rows, v.shape[-1]), dtype), jnp.zeros(rows, dtype), jnp.full(rows, MASKED, dtype)

    def add(self, sums, scores, extend, v):
        """The maximum is moved on."""
        out, total, row_max = sums
        logits = extend(scores)
        new_max = jnp.maximum(row_max, logits.max(-1))
        weights = jnp.exp(logits - new_max[..., None])
        shrink = jnp.exp(row_max - new_max)
        update = dot("bkgij,bkjd->bkgid", weights.astype(v.dtype), v, out.dtype)
        return out * shrink[..., None] + update, total * shrink + weights.sum(-1), new_max

    def finish(self, sums, dtype):
        """Outputs and log-sum-exps."""
        out, total, row_max = sums
        seen = row_max > 0.5 * MASKED
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[..., None], out / total[..., None], 0.0)
        # A row that sees nothing gets a log-sum-exp that makes every weight 0 when the backward recomputes them.
        out, lse = kept((out, jnp.where(seen, row_max + jnp.log(total), -MASKED)))
        # The backward needs the unrounded output: bfloat16 gradients of gates are sums that cancel.
        return out.astype(dtype), (out, lse)

    def rows(self, residuals, d_out):
        """lse, and out . d_out, which is subtracted from the gradients of all weights of a row."""
        out, lse = residuals
        return lse, (out * d_out.astype(out.dtype)).sum(-1)

    def pull(self, scores, extend, rows, d_weights):
        """The logits have one gradient."""
        lse, delta = rows
        weights = jnp.exp(extend(scores) - lse[..., None])
        d_logits = weights * (d_weights - delta[..., None])
        return weights, d_logits, d_logits


@dataclasses.dataclass(frozen=True)
class Form:
    """What does not depend on arrays; `function` is that of the bias, or None."""

    weights: Weights
    scale: float
    window: int | None
    function: Function | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries [N, B, K, G, C, D], keys and values [M, B, K, C, D], their rows; params of the bias, sinks [K, G]."""

    q: Any
    k: Any
    v: Any
    params: Any
    q_rows: Any
    k_rows: Any
    sinks: Any = None


def first_sums(form: Form, x: Tiles) -> Sums:
    """The sums of all rows over no keys, or over the sink of their head: a logit of a key whose value is 0."""
    sums = form.weights.empty(x.q, x.v)
    if x.sinks is None:
        return sums
    out, total, row_max = sums
    return out, jnp.ones_like(total), jnp.broadcast_to(_of_rows(x.sinks), row_max.shape).astype(row_max.dtype)


def _of_rows(sinks: jax.Array) -> jax.Array:
    return sinks[None, None, :, :, None]  # [N, B, K, G, C]


def add_keys(form: Form, sums: Sums, x: Tiles) -> Sums:
    """The sums of every query tile, with the keys of these tiles in them too."""
    dtype = accumulation_dtype(x.q, x.k, x.v)
    pairs = causal_pairs(len(x.q), len(x.k), x.k.shape[3], form.window)

    def query_tile(_, args):
        sums_i, q_i, q_tile, first_i, last_i = args

        def key_tile(j, sums):
            k_j, v_j, k_tile = _take((x.k, x.v, x.k_rows), j)
            scores = dot("bkgid,bkjd->bkgij", q_i, k_j, dtype) * form.scale
            extend = partial(_extend, _bias(form, x.params, q_tile, k_tile), q_tile, k_tile, form.window)
            return form.weights.add(sums, scores, extend, v_j)

        with expected_trips(pairs / len(x.q)):
            return None, jax.lax.fori_loop(first_i, last_i, key_tile, sums_i)

    return jax.lax.scan(query_tile, None, (sums, x.q, x.q_rows, *ranges(x.q_rows, x.k_rows, form.window)))[1]


def empty_gradients(x: Tiles) -> QueryGradients:
    """Gradients of queries, their gates and the bias from no keys."""
    dtype = accumulation_dtype(x.q)
    d_gates = None if x.q_rows.gates is None else jnp.zeros(x.q.shape[:-1], dtype)
    return jnp.zeros(x.q.shape, dtype), d_gates, jax.tree.map(jnp.zeros_like, x.params)


def add_gradients(
    form: Form, d_queries: QueryGradients, x: Tiles, rows: Any, d_out: jax.Array
) -> tuple[QueryGradients, KeyGradients]:
    """The gradients of queries with those from these keys added, and the gradients of the keys."""
    q, v = x.q, x.v
    dtype = accumulation_dtype(q, x.k, v)
    pairs = causal_pairs(len(q), len(x.k), x.k.shape[3], form.window)

    def key_tile(carry, args):
        k_j, v_j, k_tile, first_j, last_j = args

        def query_tile(i, carry):
            d_q, d_q_gates, d_params, d_k, d_v, d_gates = carry
            q_i, q_tile, rows_i, d_out_i = _take((q, x.q_rows, rows, d_out), i)
            bias, pull_bias = jax.vjp(lambda p: _bias(form, p, q_tile, k_tile), x.params)
            scores = dot("bkgid,bkjd->bkgij", q_i, k_j, dtype) * form.scale
            extend = partial(_extend, bias, q_tile, k_tile, form.window)
            d_weights = dot("bkgid,bkjd->bkgij", d_out_i, v_j, dtype)
            weights, d_scores, d_added = form.weights.pull(scores, extend, rows_i, d_weights)
            d_v += dot("bkgid,bkgij->bkdj", d_out_i, weights.astype(d_out.dtype), dtype)
            cast = d_scores.astype(q.dtype)
            d_k += dot("bkgid,bkgij->bkdj", q_i, cast, dtype)
            d_q = d_q.at[i].add(dot("bkgij,bkjd->bkgid", cast, k_j, dtype))
            if d_gates is not None:
                d_gates -= d_added.sum(-2)
                d_q_gates = d_q_gates.at[i].add(d_added.sum(-1))
            if bias is not None:
                d_bias = d_added.reshape(d_added.shape[0], -1, *d_added.shape[-2:])
                if bias.ndim == 3:  # shared by the batch; term by term, as XLA's CPU reduction over it is 50x slower
                    d_bias = functools.reduce(jnp.add, d_bias)
                d_params = jax.tree.map(jnp.add, d_params, pull_bias(d_bias.astype(bias.dtype))[0])
            return d_q, d_q_gates, d_params, d_k, d_v, d_gates

        zeros = partial(jnp.zeros, dtype=dtype)
        d_gates = None if x.k_rows.gates is None else zeros(k_tile.gates.within.shape)
        # [B, K, D, C']: with features first, XLA's CPU products are twice as fast as with keys first.
        carry = (*carry, zeros(k_j.mT.shape), zeros(v_j.mT.shape), d_gates)
        with expected_trips(pairs / len(x.k)):
            *carry, d_k, d_v, d_gates = jax.lax.fori_loop(first_j, last_j, query_tile, carry)
        return tuple(carry), (d_k, d_v, d_gates)

    return jax.lax.scan(key_tile, d_queries, (x.k, v, x.k_rows, *transposed_ranges(x.q_rows, x.k_rows, form.window)))


def gradients(form: Form, x: Tiles, rows: Any, d_queries: QueryGradients, d_keys: KeyGradients) -> tuple[Any, Tiles]:
    """Those of the gates, and of the tiles, rounded where these are."""
    (d_q, d_q_gates, d_params), (d_k, d_v, d_gates) = d_queries, d_keys
    # Row sums are 0 in exact arithmetic; kept, rounding cancels for pairs on the same side of a gate.
    d_gates = None if d_q_gates is None else (d_q_gates, d_gates)
    d_q, d_k = (d_q * form.scale).astype(x.q.dtype), (d_k.mT * form.scale).astype(x.k.dtype)
    d_sinks = None
    if x.sinks is not None:
        lse, delta = rows
        d_sinks = -jnp.sum(jnp.exp(_of_rows(x.sinks).astype(lse.dtype) - lse) * delta, (0, 1, 4)).astype(x.sinks.dtype)
    return d_gates, Tiles(d_q, d_k, d_v.mT.astype(x.v.dtype), d_params, None, None, d_sinks)


def dot(equation: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """A product accumulated in dtype; of two dtypes, in the wider one."""
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _extend(bias, q_tile: Rows, k_tile: Rows, window: int | None, scores: jax.Array) -> jax.Array:
    """Masked logits of one pair of tiles, [B, K, G, C, C']. bias is None or [H or B H, C, C']."""
    if bias is not None:
        scores += bias.astype(scores.dtype).reshape(-1, *scores.shape[1:3], *bias.shape[-2:])
    if q_tile.gates is not None:
        shift = _shift(q_tile.gates, k_tile.gates)
        scores += (q_tile.gates.within + shift[..., None])[..., :, None] - k_tile.gates.within[..., None, :]
    segments = None if q_tile.segments is None else (q_tile.segments, k_tile.segments)
    mask = visible(q_tile.order, k_tile.order, segments, window)
    return jnp.where(mask[:, None, None], scores, MASKED)


def _shift(q_gates, k_gates):
    """Log gates between the last tokens of two tiles, [B, K, G]."""
    (q_high, q_low), (k_high, k_low) = q_gates.last, k_gates.last
    return (q_high - k_high) + (q_low - k_low)


def _bias(form: Form, params, q_tile: Rows, k_tile: Rows) -> jax.Array | None:
    if form.function is None:
        return None
    return PositionBias(params, form.function)(q_tile.positions, k_tile.positions)


def _take(tree, index):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)
