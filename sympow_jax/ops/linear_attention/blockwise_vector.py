"""`blockwise` with gates of every dim: what lies between two blocks decays the keys, their own gates both sides.

Tokens are columns, [N, R, D, C]: blocks, then rows R = B K. From a block of queries the keys are walked backwards, and
from a block of keys the queries forwards, so that the log gates of the blocks in between add up along the way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.columns import from_columns, to_columns
from sympow_jax.ops.linear_attention.decay import causal_runs
from sympow_jax.ops.linear_attention.inputs import LinearInputs, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.vector_gates import (
    after_each,
    next_power_of_two,
    pair_scores,
    to_each,
    vector_gate_gradient,
)
from sympow_jax.ops.loops import causal_pairs, expected_trips
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float


def blockwise_vector(kernel: Kernel, inputs: LinearInputs, block_size: int) -> Float[Array, "B T K G Dv1"]:
    """[num, den] without an initial state."""
    if inputs.bias is not None:
        raise ValueError("bias: 'blockwise' has none beside gates of every dim; use 'reference', or one gate a head")
    padded = pad_time(inputs, next_power_of_two(block_size))
    blocks = padded.k.shape[1] // next_power_of_two(block_size)
    out: Array = _blockwise(kernel, *to_columns(padded, (blocks,)))
    return from_columns(out, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(kernel, tokens, log_gates, runs):
    return _forward(kernel, tokens, log_gates, runs)[0]


def _same_run(runs_j: Array, runs_i: Array, G: int) -> Array:
    return jnp.tile(runs_j[:, :, None] == runs_i[:, None, :], (1, 1, G))


def _own_weights(kernel: Kernel, q: Array, k: Array, log_gates: Array, runs: Array) -> Array:
    """Weights of the pairs of one block."""
    visible = jnp.tile(causal_runs(runs), (1, 1, q.shape[2] // k.shape[2]))
    return jnp.where(visible, kernel.weight(pair_scores(q, k, log_gates)), 0.0)


def _prepared(tokens, log_gates: Array):
    """Tokens in the dtype of the sums, the decays of queries from their block's start, and the sums after keys."""
    q, k, values = (x.astype(log_gates.dtype) for x in tokens)
    return q, k, values, jnp.tile(jnp.exp(to_each(log_gates)), q.shape[3] // k.shape[3]), after_each(log_gates)


def _forward(kernel, tokens, log_gates, runs):
    q, k, values, to_query, after_key = _prepared(tokens, log_gates)
    N, G = q.shape[0], q.shape[3] // k.shape[3]
    totals = jnp.sum(log_gates, axis=-1, keepdims=True)

    def one_query_block(i):
        near = q[i] * to_query[i]

        def add(step, carry):
            out, between = carry
            j = i - 1 - step
            scores = jnp.einsum("rdj,rdi->rji", k[j] * jnp.exp(after_key[j] + between), near)
            weights = jnp.where(_same_run(runs[j], runs[i], G), kernel.weight(scores), 0.0)
            return out + jnp.einsum("rej,rji->rei", values[j], weights), between + totals[j]

        own = jnp.einsum("rej,rji->rei", values[i], _own_weights(kernel, q[i], k[i], log_gates[i], runs[i]))
        with expected_trips(causal_pairs(N, N, 1) / N - 1):
            return jax.lax.fori_loop(0, i, add, (own, jnp.zeros_like(totals[0])))[0]

    return kept(jax.lax.map(one_query_block, jnp.arange(N))), (tokens, log_gates, runs)


def _backward(kernel, residuals, dout):
    tokens, log_gates, runs = residuals
    q, k, values, to_query, after_key = _prepared(tokens, log_gates)
    N, G = q.shape[0], q.shape[3] // k.shape[3]
    totals = jnp.sum(log_gates, axis=-1, keepdims=True)

    def one_key_block(dq, j):
        def add(i, carry):
            dk, dvalues, dq, between = carry
            near, decay = q[i] * to_query[i], jnp.exp(after_key[j] + between)
            far, visible = k[j] * decay, _same_run(runs[j], runs[i], G)
            scores = jnp.einsum("rdj,rdi->rji", far, near)
            weights = jnp.where(visible, kernel.weight(scores), 0.0)
            dweights = jnp.where(visible, jnp.einsum("rej,rei->rji", values[j], dout[i]), 0.0)
            dscores = dweights * kernel.derivative(scores)
            dk += decay * jnp.einsum("rji,rdi->rdj", dscores, near)
            dvalues += jnp.einsum("rji,rei->rej", weights, dout[i])
            dq_i = dq[i] + to_query[i] * jnp.einsum("rji,rdj->rdi", dscores, far)
            return dk, dvalues, jax.lax.dynamic_update_index_in_dim(dq, dq_i, i, 0), between + totals[i]

        own = functools.partial(_own_weights, kernel, log_gates=log_gates[j], runs=runs[j])
        weights, vjp = jax.vjp(own, q[j], k[j])
        dq_j, dk = vjp(jnp.einsum("rej,rei->rji", values[j], dout[j]))
        dvalues = jnp.einsum("rji,rei->rej", weights, dout[j])
        dq = jax.lax.dynamic_update_index_in_dim(dq, dq[j] + dq_j, j, 0)
        with expected_trips(causal_pairs(N, N, 1) / N - 1):
            start = (dk, dvalues, dq, jnp.zeros_like(totals[0]))
            dk, dvalues, dq, _ = jax.lax.fori_loop(j + 1, N, add, start)
        return dq, (dk, dvalues)

    dq, (dk, dvalues) = jax.lax.scan(one_key_block, jnp.zeros_like(q), jnp.arange(N))
    dcumulative = jnp.sum((q * dq).reshape(*k.shape[:3], G, -1), axis=3) - k * dk
    at_end = jnp.zeros((k.shape[1], kernel.num_features(k.shape[2])), k.dtype)
    dgates = vector_gate_gradient(kernel, dcumulative, at_end, runs)
    dtokens = tuple(d.astype(x.dtype) for d, x in zip((dq, dk, dvalues), tokens, strict=True))
    return dtokens, dgates, np.zeros(runs.shape, jax.dtypes.float0)


_blockwise.defvjp(_forward, _backward)
