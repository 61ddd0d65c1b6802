"""Chunked attention on the GPU kernels: the same values, states and gradients as `chunked`, with its contract."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.decay import left_at_end
from sympow_jax.ops.linear_attention.inputs import LinearInputs, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_gpu import keys, queries
from sympow_jax.ops.linear_attention.pallas_gpu.layouts import join_state, padded_last, split_state
from sympow_jax.ops.linear_attention.pallas_gpu.states import offset_weights, states
from sympow_jax.ops.linear_attention.pallas_gpu.tiles import F32, Tiles, num_offsets
from sympow_jax.ops.linear_attention.pallas_shared import (
    ROWS,
    decay_rows,
    gradients_of_decays,
    inner_product,
    inverse,
    rows_of_decays,
)
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float

Arrays = tuple[Any, ...]  # tokens (q, k, v), decays (log gates, runs, valid), or a state S and z


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call of the kernels."""

    kernel: Kernel
    tiles: Tiles


def fused(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` on the kernels: num / den of every row, in the dtype of v, and the final state."""
    T, D, Dv = inputs.q.shape[1], inputs.q.shape[-1], inputs.v.shape[-1]
    call = Call(kernel, Tiles.of(chunk_size, inputs.k.dtype))
    inputs = pad_time(inputs, call.tiles.chunk)
    tokens = tuple(padded_last(x) for x in (inputs.q, inputs.k, inputs.v))
    attend: Any = _fused
    out, after = attend(call, tokens, rows_of_decays(inputs), split_state(state, D))
    return out[:, :T, ..., :Dv], join_state(after, D, Dv)


def fused_state(kernel: Kernel, inputs: LinearInputs) -> Float[Array, "B K P Dv1"]:
    """`write_state` on the kernels: the state that the tokens leave behind, from nothing, as one chunk."""
    T, D, Dv = inputs.k.shape[1], inputs.k.shape[-1], inputs.v.shape[-1]
    call = Call(kernel, Tiles.of(T, inputs.k.dtype))
    inputs = pad_time(inputs, call.tiles.chunk)
    leave: Any = _state
    after = leave(call, (padded_last(inputs.k), padded_last(inputs.v)), rows_of_decays(inputs))
    return join_state(after, D, Dv)


def _decays(call: Call, decays: Arrays, like: Array) -> Float[Array, "B K 8 T"]:
    return decay_rows(decays, call.tiles.chunk).reshape(like.shape[0], like.shape[2], -1, like.shape[1])


def _decays_of_all(call: Call, decays: Arrays, like: Array) -> Float[Array, "B K 8 T"]:
    """`_decays` where all tokens are one chunk, whose sums from the start would be too large for their differences."""
    rows, (log_gates, runs, valid) = _decays(call, decays, like), decays
    to_state = jnp.where(valid, left_at_end(log_gates, runs), 0.0)
    return rows.at[:, :, ROWS.index("to_state")].set(to_state.reshape(*rows.shape[:2], -1))


def _states(call: Call, k: Array, v: Array, rows: Array, before: Arrays) -> Any:
    ones = jnp.ones((k.shape[0], k.shape[2], 1, k.shape[1]), F32)
    return states(call.tiles, k[:, :, :, None], v[:, :, :, None], ones, rows, before)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: Call, tokens: Arrays, decays: Arrays, before: Arrays) -> tuple[Array, Arrays]:
    return _forward(call, tokens, decays, before)[0]


def _forward(call: Call, tokens: Arrays, decays: Arrays, before: Arrays):
    rows = _decays(call, decays, tokens[1])
    _, k, v = tokens
    *between, s, z = _states(call, k, v, rows, before)
    out, den, s, z = kept((*queries.forward(call.kernel, call.tiles, tokens, rows, between), s, z))
    return (out, (s, z)), (tokens, decays, before, den, (s, z))


def _backward(call: Call, residuals, cotangents):
    tokens, decays, before, den, after = residuals
    dout, dafter = cotangents
    q, k, v = tokens
    rows = _decays(call, decays, k)
    dnum = (dout.astype(F32) * jnp.moveaxis(inverse(den), 3, 1)[..., None]).astype(dout.dtype)
    *between, _, _ = _states(call, k, v, rows, before)
    dq, dden = queries.backward(call.kernel, call.tiles, tokens, rows, den, dnum, between)
    *dbetween, ds, dz = states(call.tiles, q, dnum, dden, rows, _weighted(dafter), backwards=True)
    dk, dv, dcumulative = keys.backward(call.kernel, call.tiles, tokens, rows, dnum, dden, dbetween)
    dgates = _gradients_of_decays(call, dcumulative, after, dafter, decays)
    return (dq, dk, dv), dgates, _weighted((ds, dz), divide=True)


_fused.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _state(call: Call, tokens: Arrays, decays: Arrays) -> Arrays:
    return _state_forward(call, tokens, decays)[0]


def _state_forward(call: Call, tokens: Arrays, decays: Arrays):
    k, v = tokens
    B, _, K, D = k.shape
    nothing = jnp.zeros((B, K, num_offsets(D), D, v.shape[-1]), F32)
    _, _, *after = _states(call, k, v, _decays_of_all(call, decays, k), (nothing, nothing[..., 0]))
    after = tuple(kept(after))
    return after, (tokens, decays, after)


def _state_backward(call: Call, residuals, dafter):
    tokens, decays, after = residuals
    ds, dz = _weighted(dafter)
    dafter_low = ds[:, :, None].astype(tokens[1].dtype), dz[:, :, None]
    rows = _decays_of_all(call, decays, tokens[0])
    dk, dv, dcumulative = keys.backward_of_state(call.tiles, tokens, rows, dafter_low)
    return (dk, dv), _gradients_of_decays(call, dcumulative, after, dafter, decays)


_state.defvjp(_state_forward, _state_backward)


def _weighted(state: Arrays, *, divide: bool = False) -> Arrays:
    """S and z times, or divided by, the weights of their offsets: between cotangents and what `states` carries."""
    s, z = state
    weights = jnp.asarray(offset_weights(z.shape[-1]))[None, None, :, None]
    weights = 1.0 / weights if divide else weights
    return s * weights[..., None], z * weights


def _gradients_of_decays(call: Call, dcumulative: Array, after: Arrays, dafter: Arrays, decays: Arrays):
    by_row = [tuple(x.reshape(-1, *x.shape[2:]) for x in state) for state in (after, dafter)]
    flat = dcumulative.reshape(-1, dcumulative.shape[-1])
    return gradients_of_decays(flat, inner_product(*by_row), decays, call.tiles.chunk)
