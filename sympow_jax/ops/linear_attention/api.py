"""What the public functions of each linear kernel share: states, dispatch, normalisation."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.chunked import chunked
from sympow_jax.ops.linear_attention.inputs import check_arguments, group_inputs
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.recurrent import recurrent
from sympow_jax.ops.linear_attention.reference import reference
from sympow_jax.typing import Array, accumulation_dtype

IMPLEMENTATIONS = ("reference", "blockwise", "chunked", "recurrent")


def linear_attention(
    kernel: Kernel, q, k, v, *, log_gates, bias, scale, segment_ids, positions, implementation, chunk_size, state
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
    B, T, H, D = q.shape
    K, Dv = v.shape[2:]
    dtype = accumulation_dtype(q, k, v)
    if state is None:
        carried, segment = jnp.zeros((B, K, kernel.num_features(D), Dv + 1), dtype), None
    else:
        carried = jnp.concatenate([state.state, state.normalizer[..., None]], axis=-1).astype(dtype)
        segment = state.segment_id
    inputs = group_inputs(q, k, v, log_gates=log_gates, segment_ids=segment_ids, scale=scale, state_segment=segment)
    implementation = implementation or "chunked"
    if bias is not None and implementation in ("chunked", "recurrent"):
        raise ValueError(
            f"implementation={implementation!r} has no linear form for a bias; use 'reference' or 'blockwise', or a gate"
        )
    if implementation == "reference":
        weights_bias = None if bias is None else _dense_bias(bias, positions, B, T, K)
        out, final = reference(kernel, inputs, carried, weights_bias)
    elif implementation == "chunked":
        out, final = chunked(kernel, inputs, carried, min(chunk_size or 128, T))
    elif implementation == "recurrent":
        out, final = recurrent(kernel, inputs, carried)
    else:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}, or None")
    out = normalise(out, inputs.valid).reshape(B, T, H, Dv).astype(v.dtype)
    if segment_ids is not None:
        segment = segment_ids[:, -1]
    return out, final, jnp.ones(B, jnp.int32) if segment is None else segment


def normalise(extended: Array, valid: Array) -> Array:
    """num / den, and 0 with gradient 0 in rows whose weights sum to 0."""
    num, den = extended[..., :-1], extended[..., -1:]
    present = (den != 0.0) & valid[:, :, None, None, None]
    return jnp.where(present, num / jnp.where(present, den, 1.0), 0.0)


def _dense_bias(bias, positions: Array | None, B: int, T: int, K: int) -> Array:
    """The bias of every pair, [B, K, G, T, T]."""
    if positions is None:
        positions = jnp.arange(T, dtype=jnp.int32)
    dense = bias(positions, positions)
    return jnp.broadcast_to(dense.reshape(-1, K, dense.shape[-3] // K, T, T), (B, K, dense.shape[-3] // K, T, T))


def split_state(extended: Array) -> tuple[Array, Array]:
    """[S, z] -> S [B, K, P, Dv], z [B, K, P], float32."""
    return extended[..., :-1], extended[..., -1]
