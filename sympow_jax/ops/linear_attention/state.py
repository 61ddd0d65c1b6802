"""Reading an initial state and writing a final one, for the forms that do not carry a state themselves."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.decay import chunk_decay
from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float


def read_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> Float[Array, "B T K G Dv1"]:
    """exp(G_i) phi(q_i) . state for the rows of the run that the state belongs to, chunk by chunk."""
    T = inputs.k.shape[1]
    inputs = pad_time(inputs, chunk_size)

    @jax.checkpoint
    def read(carry, chunk):
        runs, gates, q = chunk
        log_decay = carry[..., None] + jnp.cumsum(gates, axis=-1)
        decay = jnp.where((runs == 0)[:, None], jnp.exp(log_decay), 0.0)
        features = kernel.features(jnp.moveaxis(q.astype(gates.dtype), 1, -1))  # [B, K, G, P, C]
        return log_decay[..., -1], jnp.einsum("bkgpc,bkpe,bkc->bckge", features, state, decay)

    chunks = (_chunks(inputs.runs, chunk_size), _gates(inputs, chunk_size), _chunks(inputs.q, chunk_size))
    _, out = jax.lax.scan(read, jnp.zeros_like(inputs.log_gates[:, 0]), chunks)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T]


def write_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> Float[Array, "B K P Dv1"]:
    """The state after the last token: the recurrence, a chunk of keys at a time."""
    inputs = pad_time(inputs, chunk_size)
    B, _, K, _ = inputs.k.shape
    gates = _gates(inputs, chunk_size)
    runs = jnp.broadcast_to(_chunks(inputs.runs, chunk_size)[:, :, None], gates.shape)
    decay = chunk_decay(*(x.reshape(1, -1, B * K, chunk_size) for x in (gates, runs)))
    to_state = decay.to_state.reshape(-1, B, K, chunk_size)
    carry = decay.carry.reshape(-1, B, K)

    @jax.checkpoint
    def write(state, chunk):
        k, v, to_state, carry = chunk
        features = kernel.features(jnp.moveaxis(k.astype(to_state.dtype), 1, -1))  # [B, K, P, C]
        added = jnp.einsum("bkpc,bcke,bkc->bkpe", features, v.astype(to_state.dtype), to_state)
        return carry[..., None, None] * state + added, None

    values = _chunks(extend_values(inputs.v, inputs.valid), chunk_size)
    return jax.lax.scan(write, state, (_chunks(inputs.k, chunk_size), values, to_state, carry))[0]


def _chunks(x: Array, chunk_size: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)


def _gates(inputs: LinearInputs, chunk_size: int) -> Array:
    """The log gates as [N, B, K, C]."""
    return jnp.moveaxis(_chunks(inputs.log_gates, chunk_size), 3, 2)
