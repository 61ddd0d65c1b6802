"""The definition: dense weights over all pairs, quadratic in time and memory. In float64 it is the oracle."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float, accumulation_dtype


def reference(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv+1"], bias: Float[Array, "B K G T T"] | None
) -> tuple[Float[Array, "B T K G Dv+1"], Float[Array, "B K P Dv+1"]]:
    """Returns [num, den] of every row and the final state; see the package docstring for the equations."""
    dtype = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = (x.astype(dtype) for x in (inputs.q, inputs.k, inputs.v))
    runs, T = inputs.runs, k.shape[1]
    values = extend_values(v, inputs.valid)

    # log_decay[i, j] = sum of the log gates of j+1 .. i
    row, column = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    gates = jnp.moveaxis(inputs.log_gates, 1, 2)  # [B, K, T]
    log_decay = jnp.cumsum(jnp.where((row > column)[None, None], gates[..., None], 0.0), axis=-2)
    visible = (runs[:, :, None] == runs[:, None, :]) & (row >= column)[None]
    decay = jnp.where(visible[:, None], jnp.exp(log_decay), 0.0)

    weights = kernel.weight(jnp.einsum("btkgd,bskd->bkgts", q, k)) * decay[:, :, None]
    if bias is not None:
        weights = weights * jnp.exp(jnp.where(visible[:, None, None], bias.astype(dtype), 0.0))
    out = jnp.einsum("bkgts,bske->btkge", weights, values)

    from_state = jnp.where(runs[:, None] == 0, jnp.exp(jnp.cumsum(gates, axis=-1)), 0.0)  # [B, K, T]
    out += jnp.einsum("btkgp,bkpe,bkt->btkge", kernel.features(q[..., None])[..., 0], state, from_state)
    final = jnp.einsum("bskp,bske,bks->bkpe", kernel.features(k[..., None])[..., 0], values, decay[:, :, -1])
    return out, final + from_state[:, :, -1, None, None] * state
