"""Chunked attention on the TPU kernels: the same values, states and gradients as `chunked`, with its contract."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_shared import (
    decay_rows,
    gradients_of_decays,
    inner_product,
    rows_of_decays,
)
from sympow_jax.ops.linear_attention.pallas_tpu import layouts
from sympow_jax.ops.linear_attention.pallas_tpu.backward import keys_backward, queries_backward
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features
from sympow_jax.ops.linear_attention.pallas_tpu.forward import forward
from sympow_jax.ops.linear_attention.pallas_tpu.state import final_state, final_state_backward
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import Tiles
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float

Arrays = tuple[Any, ...]  # tokens (q, k, v), decays (log gates, runs, valid), or a state and its moments


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call of the kernels."""

    kernel: Kernel
    features: Features
    tiles: Tiles

    @classmethod
    def of(cls, kernel: Kernel, head_dim: int, chunk_size: int, seq_len: int) -> "Call":
        """For inputs of these sizes."""
        features = layouts.features_of(kernel, head_dim)
        return cls(kernel, features, Tiles.of(chunk_size, seq_len, features.rows))


def fused(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` on the kernels: num / den of every row, in the dtype of v, and the final state."""
    B, T, _, _, D = inputs.q.shape
    Dv = inputs.v.shape[-1]
    call = Call.of(kernel, D, chunk_size, T)
    inputs = pad_time(inputs, call.tiles.block)
    tokens = tuple(layouts.rows_of_tokens(x) for x in (inputs.q, inputs.k, inputs.v))
    before = layouts.split_state(call.features, state.reshape(-1, *state.shape[2:]), D)
    attend: Any = _fused
    out, (values, moments) = attend(call, tokens, rows_of_decays(inputs), before)
    final = layouts.join_state(call.features, values, moments, D, Dv)
    return layouts.tokens_of_rows(out, B, Dv)[:, :T], final.reshape(state.shape)


def fused_state(kernel: Kernel, inputs: LinearInputs, chunk_size: int) -> Float[Array, "B K P Dv1"]:
    """`write_state` on the kernels: the state that the tokens leave behind, from nothing."""
    B, T, K, D = inputs.k.shape
    Dv = inputs.v.shape[-1]
    call = Call.of(kernel, D, chunk_size, T)
    inputs = pad_time(inputs, call.tiles.block)
    tokens = tuple(layouts.rows_of_tokens(x) for x in (inputs.k, inputs.v))
    leave: Any = _state
    values, moments = leave(call, tokens, rows_of_decays(inputs))
    final = layouts.join_state(call.features, values, moments, D, Dv)
    return final.reshape(B, K, *final.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(call: Call, tokens: Arrays, decays: Arrays, before: Arrays) -> tuple[Array, Arrays]:
    return _forward(call, tokens, decays, before)[0]


def _forward(call: Call, tokens: Arrays, decays: Arrays, before: Arrays):
    rows = decay_rows(decays, call.tiles.chunk)
    out, den, *after = kept(forward(call.kernel, call.features, call.tiles, tokens, rows, before))
    return (out, tuple(after)), (tokens, decays, before, den, tuple(after))


def _backward(call: Call, residuals, cotangents):
    tokens, decays, before, den, after = residuals
    dout, dafter = cotangents
    dafter = _symmetric(*dafter)
    rows = decay_rows(decays, call.tiles.chunk)
    dq, dden = queries_backward(call.kernel, call.features, call.tiles, tokens, rows, den, dout, before)
    dk, dv, dcumulative, *dbefore = keys_backward(
        call.kernel, call.features, call.tiles, tokens, rows, den, dout, dden, dafter
    )
    dgates = gradients_of_decays(dcumulative[:, 0], inner_product(after, dafter), decays, call.tiles.chunk)
    return (dq, dk, dv), dgates, tuple(dbefore)


_fused.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _state(call: Call, tokens: Arrays, decays: Arrays) -> Arrays:
    return _state_forward(call, tokens, decays)[0]


def _state_forward(call: Call, tokens: Arrays, decays: Arrays):
    rows = decay_rows(decays, call.tiles.chunk)
    after = tuple(kept(final_state(call.features, call.tiles, tokens, rows)))
    return after, (tokens, decays, after)


def _state_backward(call: Call, residuals, dafter):
    tokens, decays, after = residuals
    dafter = _symmetric(*dafter)
    rows = decay_rows(decays, call.tiles.chunk)
    dk, dv, dcumulative = final_state_backward(call.features, call.tiles, tokens, rows, dafter)
    return (dk, dv), gradients_of_decays(dcumulative[:, 0], inner_product(after, dafter), decays, call.tiles.chunk)


_state.defvjp(_state_forward, _state_backward)


def _symmetric(dstate: Array, dmoments: Array) -> Arrays:
    """The cotangent of the moments as the kernels take it: that of a symmetric matrix."""
    return dstate, 0.5 * (dmoments + jnp.swapaxes(dmoments, 1, 2))
