"""What the public functions of each linear kernel share: states, dispatch, normalisation."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.blockwise import blockwise
from sympow_jax.ops.linear_attention.chunked import chunked
from sympow_jax.ops.linear_attention.dispatch import choose, measured_length
from sympow_jax.ops.linear_attention.inputs import LinearInputs, check_arguments, group_inputs, normalise
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.recurrent import one_step, recurrent
from sympow_jax.ops.linear_attention.reference import reference, reference_state
from sympow_jax.ops.linear_attention.state import read_state, write_state
from sympow_jax.ops.position_bias import PositionBias
from sympow_jax.typing import Array


def linear_attention(
    kernel: Kernel,
    q,
    k,
    v,
    *,
    log_gates,
    bias,
    scale,
    segment_ids,
    positions,
    implementation,
    chunk_size,
    state,
    with_state,
) -> tuple[Array, Array, Array]:
    """Checks the arguments, runs one form, and returns out, the final state [S, z] and its segment id."""
    check_arguments(
        kernel,
        q,
        k,
        v,
        log_gates=log_gates,
        segment_ids=segment_ids,
        positions=positions,
        bias=bias,
        state=state,
        chunk_size=chunk_size,
    )
    B, T, H, _ = q.shape
    K, Dv = v.shape[2:]
    inputs = group_inputs(q, k, v, log_gates=log_gates, segment_ids=segment_ids, scale=scale, state=state)
    implementation, size = choose(kernel, inputs, implementation, chunk_size, bias)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    carries = implementation in ("chunked", "recurrent")
    final = _extended_state(kernel, inputs, state) if carries or with_state else jnp.zeros(0)  # it can be huge
    if implementation == "chunked":
        out, final = chunked(kernel, inputs, final, size)
    elif implementation == "recurrent":
        out, final = recurrent(kernel, inputs, final)
    elif implementation == "blockwise":
        out = blockwise(kernel, inputs, bias, positions, size)
        if state is not None:
            out += read_state(kernel, inputs, final, size)
        if with_state:
            final = write_state(kernel, inputs, final, size)
    else:
        out = reference(kernel, inputs, None if state is None else final, _dense_bias(bias, positions, K))
        if with_state:
            final = reference_state(kernel, inputs, final)
    if implementation != "chunked":
        out = normalise(out, axis=-1)
    out = jnp.where(inputs.valid[:, :, None, None], out.reshape(B, T, H, Dv), 0.0)
    return out.astype(v.dtype), final, _last_segment(segment_ids, state, B)


def state_of(kernel: Kernel, k, v, *, log_gates, segment_ids, chunk_size) -> tuple[Array, Array]:
    """The state [S, z] that the tokens leave behind, starting from nothing, and its segment id."""
    check_arguments(
        kernel,
        k,
        k,
        v,
        log_gates=log_gates,
        segment_ids=segment_ids,
        positions=None,
        bias=None,
        state=None,
        chunk_size=chunk_size,
    )
    inputs = group_inputs(k, k, v, log_gates=log_gates, segment_ids=segment_ids, scale=None, state=None)
    size = chunk_size or measured_length("chunked", kernel.num_features(k.shape[3]))
    final = write_state(kernel, inputs, None, min(size, k.shape[1]))
    return final, _last_segment(segment_ids, None, k.shape[0])


def linear_step(kernel: Kernel, q, k, v, *, log_gates, scale, state) -> tuple[Array, Array, Array]:
    """One token, T = 1, of the document that `state` belongs to: out, and the next state and normaliser."""
    arguments = {"segment_ids": None, "positions": None, "bias": None, "chunk_size": None}
    check_arguments(kernel, q, k, v, log_gates=log_gates, state=state, **arguments)
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens: a step takes 1; use the function `..._with_state` for more")
    inputs = group_inputs(q, k, v, log_gates=log_gates, segment_ids=None, scale=scale, state=state)
    out, next_state, normalizer = one_step(kernel, inputs, state.state, state.normalizer)
    return out.reshape(*q.shape[:3], v.shape[3]).astype(v.dtype), next_state, normalizer


def _extended_state(kernel: Kernel, inputs: LinearInputs, state) -> Array:
    """[S, z] of the initial state, [B, K, P, Dv + 1]; zeros when there is none."""
    B, _, K, Dv = inputs.v.shape
    dtype = inputs.log_gates.dtype
    if state is None:
        return jnp.zeros((B, K, kernel.num_features(inputs.k.shape[-1]), Dv + 1), dtype)
    return jnp.concatenate([state.state, state.normalizer[..., None]], axis=-1).astype(dtype)


def _last_segment(segment_ids: Array | None, state, batch_size: int) -> Array:
    """The document that the final state belongs to."""
    if segment_ids is not None:
        return segment_ids[:, -1]
    return jnp.ones(batch_size, jnp.int32) if state is None else state.segment_id


def _dense_bias(bias: PositionBias | None, positions: Array, K: int) -> Array | None:
    """The bias of every pair, [B, K, G, T, T]."""
    if bias is None:
        return None
    dense = bias(positions, positions)
    return dense.reshape(dense.shape[0], K, -1, *dense.shape[2:])


def split_state(extended: Array) -> tuple[Array, Array]:
    """[S, z] -> S [B, K, P, Dv], z [B, K, P], float32."""
    return extended[..., :-1], extended[..., -1]
