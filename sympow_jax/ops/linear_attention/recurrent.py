"""Token by token: the state is the whole memory of the past."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float


def recurrent(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"]
) -> tuple[Float[Array, "B T K G Dv1"], Float[Array, "B K P Dv1"]]:
    """S_t = exp(log_gate_t) S_(t-1) + phi(k_t) [v_t, 1]^T and [num, den]_t = phi(q_t) S_t, S reset at each new run.

    The token's own key is weighed directly, kernel(q_t . k_t), which loses no digits to the expansion.
    """
    dtype = inputs.log_gates.dtype
    previous = jnp.concatenate([jnp.zeros_like(inputs.runs[:, :1]), inputs.runs[:, :-1]], axis=1)
    gates = jnp.where((inputs.runs == previous)[..., None], jnp.exp(inputs.log_gates), 0.0)

    def step(state, token):
        q, k, v, gate = (x.astype(dtype) for x in token)
        state = gate[..., None, None] * state
        out = jnp.einsum("bkgp,bkpe->bkge", kernel.features(q[..., None])[..., 0], state)
        out += kernel.weight(jnp.einsum("bkgd,bkd->bkg", q, k))[..., None] * v[:, :, None]
        return state + kernel.features(k[..., None]) * v[:, :, None], out

    tokens = (inputs.q, inputs.k, extend_values(inputs.v, inputs.valid), gates)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1), state
