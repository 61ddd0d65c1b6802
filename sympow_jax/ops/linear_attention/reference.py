"""The definition: dense weights over all pairs, quadratic in time and memory. In float64 it is the oracle."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.ops.linear_attention.kernels import Kernel, state_decay
from sympow_jax.typing import Array, Float


def reference(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, size: int
) -> Float[Array, "B T K G Dv1"]:
    """Returns [num, den] of every row; see the package docstring for the equations."""
    del size  # there are no blocks
    dtype = inputs.log_gates.dtype
    q, k, v = (x.astype(dtype) for x in (inputs.q, inputs.k, inputs.v))
    visible, log_decay = visible_pairs(inputs)
    if inputs.has_vector_gates:  # they decay the products of the dims, before the kernel
        decay = jnp.exp(jnp.where(visible[:, None, None], log_decay, -jnp.inf))
        scores, log_decay = jnp.einsum("btkgd,bskd,bkdts->bkgts", q, k, decay), jnp.zeros_like(log_decay[:, :, :1])
    else:
        scores, log_decay = jnp.einsum("btkgd,bskd->bkgts", q, k), log_decay[:, :, None]
    if inputs.bias is not None and inputs.positions is not None:  # a bias comes with its positions
        bias = inputs.bias(inputs.positions, inputs.positions)  # [B, H, T, T]
        log_decay += bias.reshape(bias.shape[0], k.shape[2], -1, *bias.shape[2:]).astype(dtype)
    decay = jnp.exp(jnp.where(visible[:, None, None], log_decay, -jnp.inf))
    out = jnp.einsum("bkgts,bske->btkge", kernel.weight(scores) * decay, extend_values(v, inputs.valid))
    if state is not None:
        read, own = _of_state(inputs), inputs.runs == 0
        if inputs.has_vector_gates:
            q, read = q * read[:, :, :, None], jnp.ones_like(read[..., 0])
        features = kernel.features(q[..., None])[..., 0]
        out += jnp.einsum("btkgp,bkpe,btk->btkge", features, state, jnp.where(own[..., None], read, 0.0))
    return out


def reference_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None
) -> Float[Array, "B K P Dv1"]:
    """sum_j exp(G_T - G_j) phi(k_j) [v_j, 1]^T over the keys that the last token sees, and the initial state."""
    dtype = inputs.log_gates.dtype
    k = inputs.k.astype(dtype)
    visible, log_decay = visible_pairs(inputs)
    to_end = jnp.moveaxis(jnp.exp(log_decay[..., -1, :]), -1, 1)  # [B, T, K] or [B, T, K, D]
    if inputs.has_vector_gates:
        k, to_end = k * to_end, jnp.ones_like(to_end[..., 0])
    values = extend_values(inputs.v.astype(dtype), inputs.valid)
    features = kernel.features(k[..., None])[..., 0]
    added = jnp.einsum("bskp,bske,bsk->bkpe", features, values, jnp.where(visible[:, -1, :, None], to_end, 0.0))
    if state is None:
        return added
    left = state_decay(kernel, _of_state(inputs)[:, -1])
    return added + jnp.where((inputs.runs[:, -1] == 0)[:, None, None, None], left, 0.0) * state


def visible_pairs(inputs: LinearInputs) -> tuple[Array, Array]:
    """Whether i sees j, [B, T, T], and the sum of the log gates of j+1 .. i, [B, K, T, T] or [B, K, D, T, T]."""
    i, j = jnp.arange(inputs.runs.shape[1])[:, None], jnp.arange(inputs.runs.shape[1])[None, :]
    visible = (i >= j)[None] & (inputs.runs[:, :, None] == inputs.runs[:, None, :])
    gates = jnp.moveaxis(inputs.log_gates, 1, -1)[..., None]
    after = jnp.expand_dims(i > j, range(gates.ndim - 2))
    return visible, jnp.cumsum(jnp.where(after, gates, 0.0), axis=-2)


def _of_state(inputs: LinearInputs) -> Array:
    """exp(G_i), [B, T, K] or [B, T, K, D]."""
    return jnp.exp(jnp.cumsum(inputs.log_gates, axis=1))
