"""Taylor attention (Based, arXiv 2402.18668): weights 1 + s + s^2 / 2 with s = scale q_i . k_j."""

from typing import Unpack

from sympow_jax.ops.linear_attention import api
from sympow_jax.ops.linear_attention.inputs import LinearState
from sympow_jax.ops.linear_attention.kernels import TaylorKernel
from sympow_jax.typing import Array, Float


def taylor_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    **options: Unpack[api.Options],
) -> Float[Array, "B T H Dv"]:
    """Causal attention with the second-order Taylor expansion of exp as its kernel.

    out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,
    w_ij  = (1 + s_ij + s_ij^2 / 2) exp(log_gates_(j+1) + ... + log_gates_i + bias_ij),   s_ij = scale q_i . k_j

    Args:
      q, k, v: queries and keys, rotated already where positions are rotary, and values; K divides H.
      options: log_gates, bias, scale (which matters: the kernel is not homogeneous), segment_ids, positions,
        implementation and chunk_size, as in `ops.linear_attention`, which also says what is returned and raised.

    Source: Based, arXiv 2402.18668; see `ops/README.md`.
    """
    return api.linear_attention(TaylorKernel(), q, k, v, **options)


def taylor_attention_with_state(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    initial_state: LinearState | None = None,
    **options: Unpack[api.Options],
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """`taylor_attention` that continues `initial_state` and returns the state after the last token."""
    return api.linear_attention_with_state(TaylorKernel(), q, k, v, initial_state=initial_state, **options)


def taylor_step(
    state: LinearState,
    *,
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K Dv"],
    log_gates: Float[Array, "B 1 K *D"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H Dv"], LinearState]:
    """One token of decoding: the recurrence, one step on; one executable serves every position."""
    return api.linear_step(TaylorKernel(), state, q=q, k=k, v=v, log_gates=log_gates, scale=scale)
