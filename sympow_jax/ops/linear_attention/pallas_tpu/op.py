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
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import Tiles
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call of the kernels."""

    kernel: Kernel
    features: Features
    tiles: Tiles
    interpret: object = False


def fused(
    kernel: Kernel,
    inputs: LinearInputs,
    state: Float[Array, "B K P Dv1"],
    tiles: Tiles,
    *,
    interpret: object = False,
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` on the kernels."""
    B, T, K, _, D = inputs.q.shape
    Dv = inputs.v.shape[-1]
    call = Call(kernel, layouts.features_of(kernel, D), tiles, interpret)
    inputs = pad_time(inputs, tiles.block)
    rows = lambda x: jnp.repeat(x, K, axis=0)  # noqa: E731
    tokens = tuple(layouts.rows_of_tokens(x) for x in (inputs.q, inputs.k, inputs.v))
    gates = jnp.moveaxis(inputs.log_gates, 1, 2).reshape(B * K, -1)
    before = layouts.split_state(call.features, state.reshape(B * K, *state.shape[2:]), D)
    out, after = _fused(call, tokens, gates, rows(inputs.runs), rows(inputs.valid), before)
    final = layouts.join_state(call.features, *after, D, Dv)
    return layouts.tokens_of_rows(out, B, Dv)[:, :T], final.reshape(state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: Call, tokens: tuple[Array, Array, Array], log_gates: Array, runs: Array, valid: Array, before):
    return _forward(call, tokens, log_gates, runs, valid, before)[0]


def _forward(call: Call, tokens, log_gates, runs, valid, before):
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    arguments = (call.kernel, call.features, call.tiles, *tokens, decays, *before)
    out, den, *after = kept(forward(*arguments, interpret=call.interpret))
    return (out, tuple(after)), (tokens, log_gates, runs, valid, before, den, tuple(after))


def _backward(call: Call, residuals, cotangents):
    tokens, log_gates, runs, valid, before, den, after = residuals
    dout, (dstate, dmoments) = cotangents
    dmoments = 0.5 * (dmoments + jnp.swapaxes(dmoments, 1, 2))
    decays = layouts.decay_rows(log_gates, runs, valid, call.tiles.chunk)
    arguments = (call.kernel, call.features, call.tiles, *tokens, decays, den, dout)
    dq, dden = queries_backward(*arguments, *before, interpret=call.interpret)
    dk, dv, dcumulative, *dbefore = keys_backward(*arguments, dden, dstate, dmoments, interpret=call.interpret)
    at_end = sum(jnp.sum(a * d, axis=(1, 2)) for a, d in zip(after, (dstate, dmoments), strict=True))
    cut = functools.partial(layouts.in_chunks, chunk=call.tiles.chunk)
    dgates = gate_gradient(cut(dcumulative[:, 0]), at_end, cut(runs))
    dgates = jnp.moveaxis(dgates[0], 0, 1).reshape(log_gates.shape)
    zeros = (np.zeros(x.shape, jax.dtypes.float0) for x in (runs, valid))
    return (dq, dk, dv), dgates, *zeros, tuple(dbefore)


_fused.defvjp(_forward, _backward)
