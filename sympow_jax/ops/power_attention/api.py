"""Symmetric power attention (sympow): weights (scale q_i . k_j)^p for an even degree p."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.api import linear_attention, linear_step, split_state, state_of
from sympow_jax.ops.linear_attention.kernels import PowerKernel
from sympow_jax.ops.position_bias import PositionBias
from sympow_jax.typing import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowerState:
    """The past of a row, as much of it as its next token can see; its size does not depend on the context.

    state      = sum_j exp(G_T - G_j) phi(k_j) v_j^T   (keys unscaled: `scale` belongs to the queries)
    normalizer = sum_j exp(G_T - G_j) phi(k_j)

    Attributes:
      state: [B, K, P, Dv], float32, with P = C(D + degree - 1, degree).
      normalizer: [B, K, P], float32.
      segment_id: [B], the document that the state belongs to; only a next token of the same document sees it.
    """

    state: PyTree  # JAX rebuilds pytrees with stacked layers, shapes or shardings in the fields
    normalizer: PyTree
    segment_id: PyTree


def power_initial_state(
    batch_size: int, num_kv_heads: int, head_dim: int, value_head_dim: int, *, degree: int = 2
) -> PowerState:
    """The empty past: zeros, for the document with segment id 1."""
    P = _kernel(degree).num_features(head_dim)
    return PowerState(
        state=jnp.zeros((batch_size, num_kv_heads, P, value_head_dim), jnp.float32),
        normalizer=jnp.zeros((batch_size, num_kv_heads, P), jnp.float32),
        segment_id=jnp.ones(batch_size, jnp.int32),
    )


def power_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    degree: int = 2,
    log_gates: Float[Array, "B T K"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal symmetric power attention.

    out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,
    w_ij  = (scale q_i . k_j)^degree exp(log_gates_(j+1) + ... + log_gates_i + bias_ij)

    Args:
      q, k, v: queries and keys, rotated already where positions are rotary, and values; K divides H.
      degree: p, even.
      log_gates: float32, <= 0; that of step j scales everything before j, not j itself. -inf drops what is before.
      bias: added to the log-weights; quadratic forms only. `positions` (0 .. T-1 by default) are its arguments.
      scale: multiplies the scores, 1 / sqrt(D) by default; the normalisation cancels it, the state does not hold it.
      segment_ids: documents, as contiguous runs; a change is a reset, 0 is padding and gives 0.
      implementation: "reference", "blockwise", "chunked", "recurrent", or None for the cheapest by a measured table.
      chunk_size: tokens in a chunk or block; any T >= 1 works with any.

    Returns:
      [B, T, H, Dv] in the dtype of v; rows whose weights sum to 0 are 0. States and sums are float32 inside.

    Raises:
      ValueError: in one line, for shapes that do not fit, an odd degree, an unknown form, or a form without a bias.

    Source: symmetric power attention, Manifest AI (2024), arXiv 2503.03269; see `ops/README.md`.
    """
    out, _, _ = linear_attention(
        _kernel(degree),
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


def power_attention_with_state(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    degree: int = 2,
    log_gates: Float[Array, "B T K"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
) -> tuple[Float[Array, "B T H Dv"], PowerState]:
    """`power_attention` that continues `initial_state` and returns the state after the last token."""
    out, final, segment_id = linear_attention(
        _kernel(degree),
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
    return out, PowerState(*split_state(final), segment_id)


def power_state(
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    degree: int = 2,
    log_gates: Float[Array, "B T K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
) -> PowerState:
    """The state after the last token, as `power_attention_with_state` returns it, without the outputs."""
    final, segment_id = state_of(
        _kernel(degree), k, v, log_gates=log_gates, segment_ids=segment_ids, chunk_size=chunk_size
    )
    return PowerState(*split_state(final), segment_id)


def power_step(
    state: PowerState,
    *,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K Dv"],
    log_gates: Float[Array, "B 1 K"] | None = None,
    degree: int = 2,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H Dv"], PowerState]:
    """One token of decoding: the recurrence, one step on; one executable serves every position."""
    out, next_state, normalizer = linear_step(_kernel(degree), q, k, v, log_gates=log_gates, scale=scale, state=state)
    return out, dataclasses.replace(state, state=next_state, normalizer=normalizer)


def _kernel(degree: int) -> PowerKernel:
    if degree < 2 or degree % 2:
        raise ValueError(f"degree={degree} must be even (weights must not be negative): 2, 4 or 6")
    return PowerKernel(degree)
