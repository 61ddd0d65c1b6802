"""The definition: dense weights over all pairs, quadratic in time and memory. In float64 it is the oracle."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float


def reference(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, size: int
) -> Float[Array, "B T K G Dv1"]:
    """Returns [num, den] of every row; see the package docstring for the equations."""
    del size  # there are no blocks
    dtype = inputs.log_gates.dtype
    q, k, v = (x.astype(dtype) for x in (inputs.q, inputs.k, inputs.v))
    visible, log_decay = visible_pairs(inputs)
    log_decay = log_decay[:, :, None]
    if inputs.bias is not None and inputs.positions is not None:  # a bias comes with its positions
        bias = inputs.bias(inputs.positions, inputs.positions)  # [B, H, T, T]
        log_decay += bias.reshape(bias.shape[0], k.shape[2], -1, *bias.shape[2:]).astype(dtype)
    decay = jnp.exp(jnp.where(visible[:, None, None], log_decay, -jnp.inf))
    weights = kernel.weight(jnp.einsum("btkgd,bskd->bkgts", q, k)) * decay
    out = jnp.einsum("bkgts,bske->btkge", weights, extend_values(v, inputs.valid))
    if state is not None:
        features = kernel.features(q[..., None])[..., 0]
        out += jnp.einsum("btkgp,bkpe,bkt->btkge", features, state, _decay_of_state(inputs))
    return out


def reference_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, size: int
) -> Float[Array, "B K P Dv1"]:
    """sum_j exp(G_T - G_j) phi(k_j) [v_j, 1]^T over the keys that the last token sees, and the initial state."""
    del size
    dtype = inputs.log_gates.dtype
    visible, log_decay = visible_pairs(inputs)
    decay = jnp.where(visible[:, None, -1], jnp.exp(log_decay[:, :, -1]), 0.0)
    features = kernel.features(inputs.k.astype(dtype)[..., None])[..., 0]
    added = jnp.einsum("bskp,bske,bks->bkpe", features, extend_values(inputs.v.astype(dtype), inputs.valid), decay)
    return added if state is None else added + _decay_of_state(inputs)[:, :, -1, None, None] * state


def visible_pairs(inputs: LinearInputs) -> tuple[Array, Array]:
    """Whether i sees j, [B, T, T], and the sum of the log gates of j+1 .. i, [B, K, T, T]."""
    i, j = jnp.arange(inputs.runs.shape[1])[:, None], jnp.arange(inputs.runs.shape[1])[None, :]
    visible = (i >= j)[None] & (inputs.runs[:, :, None] == inputs.runs[:, None, :])
    gates = jnp.moveaxis(inputs.log_gates, 1, 2)[..., None]
    return visible, jnp.cumsum(jnp.where((i > j)[None, None], gates, 0.0), axis=-2)


def _decay_of_state(inputs: LinearInputs) -> Array:
    """exp(G_i) for the run that continues the initial state, 0 for the others, [B, K, T]."""
    total = jnp.cumsum(jnp.moveaxis(inputs.log_gates, 1, 2), axis=-1)
    return jnp.where(inputs.runs[:, None] == 0, jnp.exp(total), 0.0)
