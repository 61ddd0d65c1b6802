"""Quadratic time, linear memory: blocks of queries against blocks of keys, nothing of size T x T.

It needs no expansion, so it is the form for high degrees at large head_dim and for additive biases. Inside, tokens
are [N, R, C, D]: blocks, then rows R = B K. The backward visits the pairs of blocks again, key blocks outermost.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.blockwise_vector import blockwise_vector
from sympow_jax.ops.linear_attention.decay import gate_gradient, whole_and_rest
from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.state import read_state
from sympow_jax.ops.loops import causal_pairs, expected_trips
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float


def blockwise(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, block_size: int
) -> Float[Array, "B T K G Dv1"]:
    """Returns [num, den] of every row; see the package docstring for the equations."""
    out = _from_own_keys(kernel, inputs, block_size)
    return out if state is None else out + read_state(kernel, inputs, state)


def _from_own_keys(kernel: Kernel, inputs: LinearInputs, block_size: int) -> Float[Array, "B T K G Dv1"]:
    """[num, den] without an initial state."""
    if inputs.has_vector_gates:
        return blockwise_vector(kernel, inputs, block_size)
    B, T, K, G, _ = inputs.q.shape
    inputs = pad_time(inputs, block_size)
    positions = inputs.runs if inputs.positions is None else inputs.positions  # no bias, no use of them

    def blocks(x):  # [B, T, ...] -> [N, B, C, ...]
        return jnp.moveaxis(x.reshape(B, -1, block_size, *x.shape[2:]), 1, 0)

    q = jnp.transpose(blocks(inputs.q), (0, 1, 3, 4, 2, 5))  # [N, B, K, G, C, D]
    k, v = (jnp.moveaxis(blocks(x), 3, 2) for x in (inputs.k, extend_values(inputs.v, inputs.valid)))
    gates = jnp.moveaxis(blocks(inputs.log_gates), 3, 2)  # [N, B, K, C]
    params = None if inputs.bias is None else inputs.bias.params
    function = None if inputs.bias is None else inputs.bias.function
    out: Array = _blockwise(kernel, function, q, k, v, gates, params, blocks(inputs.runs), blocks(positions))
    return jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(B, -1, K, G, v.shape[-1])[:, :T]


def _cumulative(gates: Array) -> tuple[Array, Array]:
    """The cumulative log gates of all blocks, as exact int32 whole parts and small rests."""
    whole, rest = whole_and_rest(gates)
    totals, rests = whole[..., -1].astype(jnp.int32), rest[..., -1]

    def add(before, block):
        total, rest = before[0] + block[0], before[1] + block[1]
        carry = jnp.round(rest)
        return (total + carry.astype(jnp.int32), rest - carry), before

    zeros = jnp.zeros_like(totals[0]), jnp.zeros_like(rests[0])
    _, (total, offset) = jax.lax.scan(add, zeros, (totals, rests))
    return total[..., None] + whole.astype(jnp.int32), offset[..., None] + rest


def _decays(query, key, n_query: Array, n_key: Array, bias: Array | None) -> Array:
    """exp(G_i - G_j + bias_ij) of two blocks, [B, K, G or 1, query, key]; 0 where i does not see j."""
    whole_i, rest_i, runs_i = query
    whole_j, rest_j, runs_j = key
    C = runs_i.shape[-1]
    causal = n_query * C + jnp.arange(C)[:, None] >= n_key * C + jnp.arange(C)[None, :]
    visible = causal[None] & (runs_i[:, :, None] == runs_j[:, None, :])
    whole = (whole_i[..., :, None] - whole_j[..., None, :]).astype(rest_i.dtype)
    log_decay = (whole + (rest_i[..., :, None] - rest_j[..., None, :]))[:, :, None]
    if bias is not None:
        log_decay = log_decay + bias
    return jnp.exp(jnp.where(visible[:, None, None], log_decay, -jnp.inf))


def _block_bias(function, params, query_positions: Array, key_positions: Array, K: int) -> Array:
    """The bias of two blocks, [B, K, G, query, key]."""
    bias = jax.vmap(lambda i, j: function(params, i, j))(query_positions, key_positions)
    return bias.reshape(bias.shape[0], K, -1, *bias.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(kernel, function, q, k, v, gates, params, runs, positions):
    return _forward(kernel, function, q, k, v, gates, params, runs, positions)[0]


def _forward(kernel, function, q, k, v, gates, params, runs, positions):
    dtype = gates.dtype
    N, B, K, G, C, _ = q.shape
    decays = (*_cumulative(gates), runs)

    def one_query_block(i):
        q_i = q[i].astype(dtype)

        def add(j, out):
            scores = jnp.einsum("bkgid,bkjd->bkgij", q_i, k[j].astype(dtype))
            bias = None if function is None else _block_bias(function, params, positions[i], positions[j], K)
            weights = kernel.weight(scores) * _decays(_at(decays, i), _at(decays, j), i, j, bias)
            return out + jnp.einsum("bkgij,bkje->bkgie", weights, v[j].astype(dtype))

        with expected_trips(causal_pairs(N, N, C) / N):
            return jax.lax.fori_loop(0, i + 1, add, jnp.zeros((B, K, G, C, v.shape[-1]), dtype))

    out = kept(jax.lax.map(one_query_block, jnp.arange(N)))
    return out, (q, k, v, gates, params, runs, positions, out)


def _at(arrays, i):
    return jax.tree.map(lambda x: x[i], arrays)


def _backward(kernel, function, residuals, dout):
    q, k, v, gates, params, runs, positions, out = residuals
    dtype = gates.dtype
    N, B, K, _, C, _ = q.shape
    decays = (*_cumulative(gates), runs)

    def pair(i, j, k_j, v_j):
        """Gradients of the keys, values, queries and parameters from one pair of blocks."""
        q_i, dout_i = q[i].astype(dtype), dout[i]
        scores = jnp.einsum("bkgid,bkjd->bkgij", q_i, k_j)
        bias, dparams = None, None
        if function is not None:
            bias, bias_vjp = jax.vjp(lambda p: _block_bias(function, p, positions[i], positions[j], K), params)
        decay = _decays(_at(decays, i), _at(decays, j), i, j, bias)
        weights = kernel.weight(scores) * decay
        dweights = jnp.einsum("bkgie,bkje->bkgij", dout_i, v_j)
        if function is not None:
            (dparams,) = bias_vjp(dweights * weights)
        dscores = dweights * decay * kernel.derivative(scores)
        dk = jnp.einsum("bkgid,bkgij->bkdj", q_i, dscores)
        dv = jnp.einsum("bkgie,bkgij->bkej", dout_i, weights)
        return dk, dv, jnp.einsum("bkgij,bkjd->bkgid", dscores, k_j), dparams

    def one_key_block(carry, j):
        k_j, v_j = k[j].astype(dtype), v[j].astype(dtype)

        def add(i, carry):
            dk, dv, dq, dparams = carry
            dk_ij, dv_ij, dq_ij, dparams_ij = pair(i, j, k_j, v_j)
            dq = jax.lax.dynamic_update_index_in_dim(dq, dq[i] + dq_ij, i, 0)
            return dk + dk_ij, dv + dv_ij, dq, jax.tree.map(jnp.add, dparams, dparams_ij)

        with expected_trips(causal_pairs(N, N, C) / N):
            # [B, K, D, C]: with tokens first, the transposition of every tile takes XLA's CPU as long as its products.
            zeros = jnp.zeros_like(k_j.mT), jnp.zeros_like(v_j.mT)
            dk, dv, *carry = jax.lax.fori_loop(j, N, add, (*zeros, *carry))
        dk, dv = dk.mT, dv.mT
        return tuple(carry), (dk.astype(k.dtype), dv.astype(v.dtype), jnp.sum(dv * v_j, axis=-1))

    empty = jnp.zeros(q.shape, dtype), jax.tree.map(jnp.zeros_like, params)
    (dq, dparams), (dk, dv, keys) = jax.lax.scan(one_key_block, empty, jnp.arange(N))
    dcumulative = jnp.sum(out * dout, axis=(-1, 3)) - keys
    rows = jnp.broadcast_to(runs[:, :, None], gates.shape)
    flat = (x.reshape(N, B * K, C) for x in (dcumulative, rows))
    dgates = gate_gradient(next(flat), jnp.zeros(B * K, dtype), next(flat)).reshape(gates.shape)
    integers = (np.zeros(x.shape, jax.dtypes.float0) for x in (runs, positions))
    return dq.astype(q.dtype), dk, dv, dgates, dparams, *integers


_blockwise.defvjp(_forward, _backward)
