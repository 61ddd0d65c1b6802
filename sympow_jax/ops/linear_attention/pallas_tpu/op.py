"""Chunked attention on the TPU kernels: the same values, states and gradients as `chunked`, with its contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.decay import gate_gradient
from sympow_jax.ops.linear_attention.inputs import LinearInputs, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_tpu import layouts
from sympow_jax.ops.linear_attention.pallas_tpu.backward import keys_backward, queries_backward
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features
from sympow_jax.ops.linear_attention.pallas_tpu.forward import forward
from sympow_jax.ops.linear_attention.pallas_tpu.state import final_state, final_state_backward
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import Tiles
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float

Pair = tuple[Array, Array]  # of a state and its moments, or of keys and values


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call of the kernels."""

    kernel: Kernel
    features: Features
    tiles: Tiles


def fused(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` on the kernels: num / den of every row, in the dtype of v, and the final state."""
    B, T, _, _, D = inputs.q.shape
    Dv = inputs.v.shape[-1]
    call = Call(kernel, layouts.features_of(kernel, D), Tiles.of(chunk_size, T))
    inputs = pad_time(inputs, call.tiles.block)
    tokens = tuple(layouts.rows_of_tokens(x) for x in (inputs.q, inputs.k, inputs.v))
    before = layouts.split_state(call.features, state.reshape(-1, *state.shape[2:]), D)
    out, after = _fused(call, tokens, *layouts.rows_of_decays(inputs), before)
    final = layouts.join_state(call.features, *after, D, Dv)
    return layouts.tokens_of_rows(out, B, Dv)[:, :T], final.reshape(state.shape)


def fused_state(kernel: Kernel, inputs: LinearInputs, chunk_size: int) -> Float[Array, "B K P Dv1"]:
    """`write_state` on the kernels: the state that the tokens leave behind, from nothing."""
    B, T, K, D = inputs.k.shape
    Dv = inputs.v.shape[-1]
    call = Call(kernel, layouts.features_of(kernel, D), Tiles.of(chunk_size, T))
    inputs = pad_time(inputs, call.tiles.block)
    tokens = tuple(layouts.rows_of_tokens(x) for x in (inputs.k, inputs.v))
    final = layouts.join_state(call.features, *_state(call, tokens, *layouts.rows_of_decays(inputs)), D, Dv)
    return final.reshape(B, K, *final.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: Call, tokens: tuple[Array, Array, Array], log_gates: Array, runs: Array, valid: Array, before: Pair):
    return _forward(call, tokens, log_gates, runs, valid, before)[0]


def _forward(call: Call, tokens, log_gates, runs, valid, before):
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    arguments = (call.kernel, call.features, call.tiles, *tokens, decays, *before)
    out, den, *after = kept(forward(*arguments))
    return (out, tuple(after)), (tokens, log_gates, runs, valid, before, den, tuple(after))


def _backward(call: Call, residuals, cotangents):
    tokens, log_gates, runs, valid, before, den, after = residuals
    dout, dafter = cotangents
    dafter = _symmetric(dafter)
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    arguments = (call.kernel, call.features, call.tiles, *tokens, decays, den, dout)
    dq, dden = queries_backward(*arguments, *before)
    dk, dv, dcumulative, *dbefore = keys_backward(*arguments, dden, *dafter)
    dgates = _gate_gradient(call, dcumulative, after, dafter, runs)
    return (dq, dk, dv), dgates, *_no_gradients(runs, valid), tuple(dbefore)


_fused.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _state(call: Call, tokens: Pair, log_gates: Array, runs: Array, valid: Array) -> Pair:
    return _state_forward(call, tokens, log_gates, runs, valid)[0]


def _state_forward(call: Call, tokens, log_gates, runs, valid):
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    after = tuple(kept(final_state(call.features, call.tiles, *tokens, decays)))
    return after, (tokens, log_gates, runs, valid, after)


def _state_backward(call: Call, residuals, dafter):
    tokens, log_gates, runs, valid, after = residuals
    dafter = _symmetric(dafter)
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    arguments = (call.features, call.tiles, *tokens, decays, *dafter)
    dk, dv, dcumulative = final_state_backward(*arguments)
    dgates = _gate_gradient(call, dcumulative, after, dafter, runs)
    return (dk, dv), dgates, *_no_gradients(runs, valid)


_state.defvjp(_state_forward, _state_backward)


def _symmetric(dafter: Pair) -> Pair:
    """The cotangent of the moments as the kernels take it: that of a symmetric matrix."""
    dstate, dmoments = dafter
    return dstate, 0.5 * (dmoments + jnp.swapaxes(dmoments, 1, 2))


def _gate_gradient(call: Call, dcumulative: Array, after: Pair, dafter: Pair, runs: Array) -> Array:
    """[R, T], from the gradient of the cumulative gates and what the final state adds at the end."""
    at_end = sum(jnp.sum(a * d, axis=(1, 2)) for a, d in zip(after, dafter, strict=True))
    cut = functools.partial(layouts.in_chunks, chunk=call.tiles.chunk)
    dgates = gate_gradient(cut(dcumulative[:, 0]), jnp.asarray(at_end), cut(runs))
    return jnp.moveaxis(dgates[0], 0, 1).reshape(runs.shape)


def _no_gradients(*arrays: Array) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(x.shape, jax.dtypes.float0) for x in arrays)
