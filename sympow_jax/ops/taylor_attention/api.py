"""Taylor attention (Based, arXiv 2402.18668): weights 1 + s + s^2 / 2 with s = scale q_i . k_j."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.api import linear_attention, linear_step, split_state, state_of
from sympow_jax.ops.linear_attention.kernels import TaylorKernel
from sympow_jax.ops.position_bias import PositionBias
from sympow_jax.typing import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaylorState:
    """The past of a row, as much of it as its next token can see; its size does not depend on the context.

    state      = sum_j exp(G_T - G_j) phi(k_j) v_j^T   (keys unscaled: `scale` belongs to the queries)
    normalizer = sum_j exp(G_T - G_j) phi(k_j)

    Attributes:
      state: [B, K, P, Dv], float32, with P = 1 + D + D (D + 1) / 2.
      normalizer: [B, K, P], float32.
      segment_id: [B], the document that the state belongs to; only a next token of the same document sees it.
    """

    state: PyTree  # JAX rebuilds pytrees with stacked layers, shapes or shardings in the fields
    normalizer: PyTree
    segment_id: PyTree


def taylor_initial_state(batch_size: int, num_kv_heads: int, head_dim: int, value_head_dim: int) -> TaylorState:
    """The empty past: zeros, for the document with segment id 1."""
    P = TaylorKernel().num_features(head_dim)
    return TaylorState(
        state=jnp.zeros((batch_size, num_kv_heads, P, value_head_dim), jnp.float32),
        normalizer=jnp.zeros((batch_size, num_kv_heads, P), jnp.float32),
        segment_id=jnp.ones(batch_size, jnp.int32),
    )


def taylor_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal attention with the second-order Taylor expansion of exp as its kernel.

    out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,
    w_ij  = (1 + s_ij + s_ij^2 / 2) exp(log_gates_(j+1) + ... + log_gates_i + bias_ij),   s_ij = scale q_i . k_j

    Args:
      q, k, v: queries and keys, rotated already where positions are rotary, and values; K divides H.
      log_gates: float32, <= 0; that of step j scales everything before j, not j itself. -inf drops what is before.
      bias: added to the log-weights; quadratic forms only. `positions` (0 .. T-1 by default) are its arguments.
      scale: multiplies the scores, 1 / sqrt(D) by default; it matters here, as the kernel is not homogeneous.
      segment_ids: documents, as contiguous runs; a change is a reset, 0 is padding and gives 0.
      implementation: "reference", "blockwise", "chunked", "recurrent", or None for the cheapest by a measured table.
      chunk_size: tokens in a chunk or block; any T >= 1 works with any.

    Returns:
      [B, T, H, Dv] in the dtype of v; rows whose weights sum to 0 are 0. States and sums are float32 inside.

    Raises:
      ValueError: in one line, for shapes that do not fit, an unknown form, or a form without a bias.

    Source: Based, arXiv 2402.18668; see `ops/README.md`.
    """
    out, _, _ = linear_attention(
        TaylorKernel(),
        q,
        k,
        v,
        log_gates=log_gates,
        bias=bias,
        scale=scale,
        segment_ids=segment_ids,
        positions=positions,
        implementation=implementation,
        chunk_size=chunk_size,
        state=None,
        with_state=False,
    )
    return out


def taylor_attention_with_state(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    initial_state: TaylorState | None = None,
) -> tuple[Float[Array, "B T H Dv"], TaylorState]:
    """`taylor_attention` that continues `initial_state` and returns the state after the last token."""
    out, final, segment_id = linear_attention(
        TaylorKernel(),
        q,
        k,
        v,
        log_gates=log_gates,
        bias=bias,
        scale=scale,
        segment_ids=segment_ids,
        positions=positions,
        implementation=implementation,
        chunk_size=chunk_size,
        state=initial_state,
        with_state=True,
    )
    return out, TaylorState(*split_state(final), segment_id)


def taylor_state(
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
) -> TaylorState:
    """The state after the last token, as `taylor_attention_with_state` returns it, without the outputs."""
    final, segment_id = state_of(
        TaylorKernel(), k, v, log_gates=log_gates, segment_ids=segment_ids, chunk_size=chunk_size
    )
    return TaylorState(*split_state(final), segment_id)


def taylor_step(
    state: TaylorState,
    *,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K Dv"],
    log_gates: Float[Array, "B 1 K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H Dv"], TaylorState]:
    """One token of decoding: the recurrence, one step on; one executable serves every position."""
    out, next_state, normalizer = linear_step(TaylorKernel(), q, k, v, log_gates=log_gates, scale=scale, state=state)
    return out, dataclasses.replace(state, state=next_state, normalizer=normalizer)
