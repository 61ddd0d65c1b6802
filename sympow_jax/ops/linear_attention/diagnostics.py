"""A check on inputs: how many digits a linear form can lose."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import group_inputs
from sympow_jax.ops.linear_attention.reference import visible_pairs
from sympow_jax.typing import Array, Float, Int


def power_condition(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    *,
    degree: int = 2,
    log_gates: Float[Array, "B T K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """The condition number of each row's normaliser when it is summed over expanded features, >= 1.

    condition_i = sum_j |q_i|^p |k_j|^p decay_ij / sum_j (q_i . k_j)^p decay_ij

    phi(q_i) . phi(k_j) adds up terms as large as |q_i|^p |k_j|^p, so a form that goes through the expansion (chunked,
    recurrent) has relative errors of about this number times the rounding of the dtype, where the quadratic forms
    have p times the rounding of a score. Rows whose keys all are nearly orthogonal to the query are ill-conditioned,
    the more the higher the degree; rows without any weight give inf. Dense: quadratic in T.
    """
    inputs = group_inputs(q, k, k, log_gates=log_gates, segment_ids=segment_ids, scale=1.0, state=None)
    visible, log_decay = visible_pairs(inputs)
    visible &= inputs.valid[:, None, :]
    decay = jnp.exp(jnp.where(visible[:, None], log_decay, -jnp.inf))
    dtype = inputs.log_gates.dtype
    queries, keys = (
        x.astype(dtype) / jnp.maximum(jnp.linalg.norm(x.astype(dtype), axis=-1, keepdims=True), 1e-30)
        for x in (inputs.q, inputs.k)
    )
    sizes = jnp.sum(inputs.k.astype(dtype) ** 2, axis=-1) ** (degree // 2)
    bound = jnp.einsum("bkts,bsk->btk", decay, sizes)[..., None]
    scores = jnp.einsum("btkgd,bskd->bkgts", queries, keys) ** degree
    total = jnp.einsum("bkgts,bkts,bsk->btkg", scores, decay, sizes)
    condition = jnp.where(total > 0, bound / jnp.where(total > 0, total, 1.0), jnp.inf)
    return condition.reshape(q.shape[:3])
