"""Linear attention with any kernel; `power_attention`, `taylor_attention` and the layers call these functions."""

import dataclasses
from typing import TypedDict, Unpack

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.accelerators import pallas_state
from sympow_jax.ops.linear_attention.dispatch import Implementation, choose, fastest_chunked
from sympow_jax.ops.linear_attention.forms import FORMS
from sympow_jax.ops.linear_attention.inputs import LinearState, check_arguments, group_inputs
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.recurrent import one_step
from sympow_jax.ops.linear_attention.state import write_state
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.typing import Array, Float, Int


class Options(TypedDict, total=False):
    """Keyword arguments of `linear_attention`, which explains them."""

    log_gates: Float[Array, "B T K *D"] | None
    bias: PositionBias | None
    scale: float | None
    segment_ids: Int[Array, "B T"] | None
    positions: Int[Array, "B T"] | None
    implementation: Implementation | None
    chunk_size: int | None


def linear_attention(
    kernel: Kernel,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    **options: Unpack[Options],
) -> Float[Array, "B T H Dv"]:
    """Causal attention whose weights are a kernel of the score.

    out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,
    w_ij  = kernel(scale q_i . k_j) exp(log_gates_(j+1) + ... + log_gates_i + bias_ij)

    Args:
      kernel: the weight function and its features.
      q, k, v: queries and keys, rotated already where positions are rotary, and values; K divides H.
      log_gates: [B, T, K] float32, <= 0; that of step j scales everything before j, not j itself; -inf drops it. Or
        gates of every dim, [B, T, K, D], inside the score: sum_d q_id k_jd exp(log_gates_(j+1)d + ... + log_gates_id).
      bias: added to the log-weights; quadratic forms only. `positions` (0 .. T-1 by default) are its arguments.
      scale: multiplies the scores, 1 / sqrt(D) by default; the state does not hold it.
      segment_ids: [B, T] int32, documents as contiguous runs; a change is a reset, 0 is padding and gives 0.
      implementation: "reference", "blockwise", "chunked", "recurrent", "pallas" (kernels of TPUs: degree 2 and Taylor;
        of GPUs: degree 2, head_dim to 128), or None for the cheapest by a measured table.
      chunk_size: tokens in a chunk or block; any T >= 1 works with any. Gates of every dim take the next power of 2.

    Returns:
      [B, T, H, Dv] in the dtype of v; rows whose weights sum to 0 are 0. States and sums are float32 inside.

    Raises:
      ValueError: in one line, for shapes that do not fit, an unknown form, or a form without a bias.

    Sources: `ops/README.md`.
    """
    return _attend(kernel, q, k, v, initial_state=None, with_state=False, **options)[0]


def linear_attention_with_state(
    kernel: Kernel,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    initial_state: LinearState | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """`linear_attention` that continues `initial_state` and returns the state after the last token."""
    out, final = _attend(kernel, q, k, v, initial_state=initial_state, with_state=True, **options)
    assert final is not None  # every form leaves a state when it is asked to
    return out, _state(final, options.get("segment_ids"), initial_state)


def _attend(
    kernel: Kernel,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K *D"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    initial_state: LinearState | None,
    with_state: bool,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B K P Dv1"] | None]:
    """Checks the arguments and runs one form: out, and [S, z] after the last token."""
    tokens = {"log_gates": log_gates, "segment_ids": segment_ids, "positions": positions, "bias": bias}
    known = {"state": initial_state, "with_state": with_state, "chunk_size": chunk_size}
    check_arguments(kernel, q, k, v, **tokens, **known)
    inputs = group_inputs(q, k, v, **tokens, scale=scale, state=initial_state)
    chosen, size = choose(kernel, inputs, implementation, chunk_size)
    out, final = FORMS[chosen](kernel, inputs, initial_state, size, with_state=with_state)
    out = jnp.where(inputs.valid[:, :, None, None], out.reshape(*q.shape[:3], v.shape[3]), 0.0)
    return out.astype(v.dtype), final


def empty_state(kernel: Kernel, batch_size: int, num_kv_heads: int, head_dim: int, value_head_dim: int) -> LinearState:
    """The empty past: zeros, for the document with segment id 1."""
    P = kernel.num_features(head_dim)
    return LinearState(
        state=jnp.zeros((batch_size, num_kv_heads, P, value_head_dim), jnp.float32),
        normalizer=jnp.zeros((batch_size, num_kv_heads, P), jnp.float32),
        segment_id=jnp.ones(batch_size, jnp.int32),
    )


def state_of(
    kernel: Kernel,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K *D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
    chunk_size: int | None = None,
) -> LinearState:
    """The state after the last token, as `linear_attention_with_state` returns it, without the outputs.

    "pallas" is an accelerator's kernel, any other name XLA's sum; None is a TPU's kernel where it can do the call.
    """
    tokens = {"log_gates": log_gates, "segment_ids": segment_ids, "state": None}
    check_arguments(kernel, k, k, v, **tokens, positions=None, bias=None, chunk_size=chunk_size)
    inputs = group_inputs(k, k, v, **tokens, scale=None)
    if implementation is None:
        implementation = "chunked" if chunk_size else fastest_chunked(kernel, inputs)
    chosen, size = choose(kernel, inputs, "pallas" if implementation == "pallas" else "chunked", chunk_size)
    if chosen == "pallas":
        return _state(pallas_state(kernel, inputs, size), segment_ids, None)
    return _state(write_state(kernel, inputs, None, size), segment_ids, None)


def linear_step(
    kernel: Kernel,
    state: LinearState,
    *,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    log_gates: Float[Array, "B T K *D"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """One token, T = 1, of the document that `state` belongs to: the recurrence, one step on.

    One executable serves every position.
    """
    tokens = {"log_gates": log_gates, "segment_ids": None, "state": state}
    check_arguments(kernel, q, k, v, **tokens, positions=None, bias=None, chunk_size=None)
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens: a step takes 1; use the function `..._with_state` for more")
    inputs = group_inputs(q, k, v, **tokens, scale=scale)
    out, after, normalizer = one_step(kernel, inputs, state.state, state.normalizer)
    out = out.reshape(*q.shape[:3], v.shape[3]).astype(v.dtype)
    return out, dataclasses.replace(state, state=after, normalizer=normalizer)


def _state(
    extended: Float[Array, "B K P Dv1"], segment_ids: Int[Array, "B T"] | None, before: LinearState | None
) -> LinearState:
    """From [S, z], and the document of the last token."""
    if segment_ids is not None:
        last = segment_ids[:, -1]
    else:
        last = jnp.ones(extended.shape[0], jnp.int32) if before is None else before.segment_id
    return LinearState(extended[..., :-1], extended[..., -1], last)
