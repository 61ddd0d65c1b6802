"""A check on inputs: how many digits a linear form can lose."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.blockwise import blockwise
from sympow_jax.ops.linear_attention.inputs import group_inputs
from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel, TaylorKernel
from sympow_jax.typing import Array, Float, Int, accumulation_dtype


def power_condition(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    *,
    degree: int = 2,
    log_gates: Float[Array, "B T K *D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """The condition number of each row's normaliser when it is summed over expanded features, >= 1.

    condition_i = sum_j |q_i|^p |k_j|^p decay_ij / sum_j (q_i . k_j)^p decay_ij

    phi(q_i) . phi(k_j) adds up terms as large as |q_i|^p |k_j|^p, so a form that goes through the expansion (chunked,
    recurrent) has relative errors of about this number times the rounding of the dtype, where the quadratic forms
    have p times the rounding of a score. Rows whose keys all are nearly orthogonal to the query are ill-conditioned,
    the more the higher the degree; rows without any weight give inf. Gates of every dim decay the dims, whose products
    then are added up by their absolute values, sum_d |q_id k_jd| decay_ijd, instead of |q_i| |k_j|. Quadratic in time,
    linear in memory.
    """
    dtype = accumulation_dtype(q, k)
    size = jnp.linalg.norm(q.astype(dtype), axis=-1, keepdims=True)
    unit = q.astype(dtype) / jnp.maximum(size, 1e-30)  # the length of a query cancels
    options = {"log_gates": log_gates, "segment_ids": segment_ids, "scale": 1.0}
    sizes = _sizes(unit, k.astype(dtype), log_gates)
    bound = _normalizers(PowerKernel(degree), *sizes, **options)
    total = _normalizers(PowerKernel(degree), unit, k.astype(dtype), **options)
    return jnp.where(total > 0, bound / jnp.where(total > 0, total, 1.0), jnp.inf)


def taylor_condition(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    *,
    log_gates: Float[Array, "B T K *D"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H"]:
    """`power_condition` of Taylor attention: sum_j w(scale |q_i| |k_j|) decay_ij / sum_j w(scale q_i . k_j) decay_ij.

    w(s) = 1 + s + s^2 / 2 is at least 1/2, so no row is without weight.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.astype(accumulation_dtype(q, k)) for x in (q, k))
    options = {"log_gates": log_gates, "segment_ids": None, "scale": scale}
    return _normalizers(TaylorKernel(), *_sizes(q, k, log_gates), **options) / _normalizers(
        TaylorKernel(), q, k, **options
    )


def _sizes(q: Array, k: Array, log_gates: Array | None) -> list[Array]:
    """Norms of queries and keys, or, where gates tell the dims apart, the absolute values of each."""
    if log_gates is not None and log_gates.ndim == 4:
        return [jnp.abs(x) for x in (q, k)]
    return [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]


def _normalizers(kernel: Kernel, q: Array, k: Array, *, log_gates, segment_ids, scale: float) -> Float[Array, "B T H"]:
    """sum_j kernel(scale q_i . k_j) decay_ij, block by block."""
    inputs = group_inputs(q, k, k[..., :0], log_gates=log_gates, segment_ids=segment_ids, scale=scale, state=None)
    sums = blockwise(kernel, inputs, None, min(128, q.shape[1]))
    return sums.reshape(q.shape[:3])  # of no value but the normaliser
