"""Token by token: the state is the whole memory of the past."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values, normalise
from sympow_jax.ops.linear_attention.kernels import Kernel, state_decay
from sympow_jax.typing import Array, Float


def recurrent(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """S_t = exp(log_gate_t) S_(t-1) + phi(k_t) [v_t, 1]^T and [num, den]_t = phi(q_t) S_t, S reset at each new run.

    The token's own key is weighed directly, kernel(q_t . k_t), which loses no digits to the expansion. Returns
    num / den and the final state.
    """
    del size  # there are no chunks
    dtype = inputs.log_gates.dtype
    previous = jnp.concatenate([jnp.zeros_like(inputs.runs[:, :1]), inputs.runs[:, :-1]], axis=1)
    continues = (inputs.runs == previous).astype(dtype)

    def step(state, token):
        q, k, v, gates, continues = (x.astype(dtype) for x in token)
        state = continues[:, None, None, None] * state_decay(kernel, gates) * state
        out = jnp.einsum("bkgp,bkpe->bkge", kernel.features(q[..., None])[..., 0], state)
        out += kernel.weight(jnp.einsum("bkgd,bkd->bkg", q, k))[..., None] * v[:, :, None]
        return state + kernel.features(k[..., None]) * v[:, :, None], out

    tokens = (inputs.q, inputs.k, extend_values(inputs.v, inputs.valid), jnp.exp(inputs.log_gates), continues)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return normalise(jnp.moveaxis(out, 0, 1), axis=-1), state


def one_step(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv"], normalizer: Float[Array, "B K P"]
) -> tuple[Float[Array, "B K G Dv"], Float[Array, "B K P Dv"], Float[Array, "B K P"]]:
    """One token of `recurrent`, num / den, on a state whose normaliser is apart: no copy of the state is made."""
    dtype = inputs.log_gates.dtype
    q, k, v = (x[:, 0].astype(dtype) for x in (inputs.q, inputs.k, inputs.v))
    own = kernel.weight(jnp.einsum("bkgd,bkd->bkg", q, k))
    gate = jnp.exp(inputs.log_gates[:, 0])
    if inputs.has_vector_gates:  # what phi(q) reads of the decayed state, phi(gates q) reads of the state
        q, decay, gate = q * gate[:, :, None], state_decay(kernel, gate)[..., 0], jnp.ones_like(gate[..., :1])
    else:
        gate = decay = gate[..., None]
    q_features, k_features = (kernel.features(x[..., None])[..., 0] for x in (q, k))
    den = gate * jnp.einsum("bkgp,bkp->bkg", q_features, normalizer) + own
    num = gate[..., None] * jnp.einsum("bkgp,bkpe->bkge", q_features, state) + own[..., None] * v[:, :, None]
    out = normalise(jnp.concatenate([num, den[..., None]], axis=-1), axis=-1)
    state = decay[..., None] * state + k_features[..., None] * v[:, :, None]
    return out, state, decay * normalizer + k_features
