"""Symmetric power attention (sympow): weights (scale q_i . k_j)^p for an even degree p."""

from typing import Unpack

from sympow_jax.ops.linear_attention import api
from sympow_jax.ops.linear_attention.inputs import LinearState
from sympow_jax.ops.linear_attention.kernels import PowerKernel
from sympow_jax.typing import Array, Float


def power_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    degree: int = 2,
    **options: Unpack[api.Options],
) -> Float[Array, "B T H Dv"]:
    """Causal symmetric power attention.

    out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,
    w_ij  = (scale q_i . k_j)^degree exp(log_gates_(j+1) + ... + log_gates_i + bias_ij)

    Args:
      q, k, v: queries and keys, rotated already where positions are rotary, and values; K divides H.
      degree: p, even.
      options: log_gates, bias, scale (which the normalisation cancels), segment_ids, positions, implementation and
        chunk_size, as in `ops.linear_attention`, which also says what is returned and raised.

    Source: symmetric power attention, Manifest AI (2024), arXiv 2503.03269; see `ops/README.md`.
    """
    return api.linear_attention(PowerKernel(degree), q, k, v, **options)


def power_attention_with_state(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    degree: int = 2,
    initial_state: LinearState | None = None,
    **options: Unpack[api.Options],
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """`power_attention` that continues `initial_state` and returns the state after the last token."""
    return api.linear_attention_with_state(PowerKernel(degree), q, k, v, initial_state=initial_state, **options)


def power_step(
    state: LinearState,
    *,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K Dv"],
    log_gates: Float[Array, "B 1 K *D"] | None = None,
    degree: int = 2,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H Dv"], LinearState]:
    """One token of decoding: the recurrence, one step on; one executable serves every position."""
    return api.linear_step(PowerKernel(degree), state, q=q, k=k, v=v, log_gates=log_gates, scale=scale)
