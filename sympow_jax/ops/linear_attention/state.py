"""Reading an initial state and writing a final one, for the forms that do not carry a state themselves."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel, state_decay
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
        decay, q = jnp.exp(log_decay), jnp.moveaxis(q.astype(gates.dtype), 1, -1)
        if inputs.has_vector_gates:
            decay, q = jnp.ones_like(decay[:, :, 0]), q * decay[:, :, None]
        decay = jnp.where((runs == 0)[:, None], decay, 0.0)
        features = kernel.features(q)  # [B, K, G, P, C]
        return log_decay[..., -1], jnp.einsum("bkgpc,bkpe,bkc->bckge", features, state, decay)

    chunks = (_chunks(inputs.runs, chunk_size), _gates(inputs, chunk_size), _chunks(inputs.q, chunk_size))
    _, out = jax.lax.scan(read, jnp.zeros_like(inputs.log_gates[:, 0]), chunks)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T]


def write_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, chunk_size: int
) -> Float[Array, "B K P Dv1"]:
    """exp(G_T) state + sum_j exp(G_T - G_j) phi(k_j) [v_j, 1]^T over the run of the last token, a chunk at a time.

    A plain sum, so that its gradient needs no states in between.
    """
    gates, k = jnp.moveaxis(inputs.log_gates, 1, -1), inputs.k
    remaining = jnp.flip(jnp.cumsum(jnp.flip(gates, -1), -1), -1)  # G_T - G_(j-1), j = 1 .. T
    after = jnp.pad(remaining[..., 1:], [(0, 0)] * (gates.ndim - 1) + [(0, 1)])  # G_T - G_j
    decay = jnp.exp(after)
    if inputs.has_vector_gates:
        k, decay = k.astype(gates.dtype) * jnp.moveaxis(decay, -1, 1), jnp.ones_like(decay[:, :, 0])
    weights = jnp.where((inputs.runs == inputs.runs[:, -1:])[:, None], decay, 0.0)
    values = extend_values(inputs.v, inputs.valid).astype(gates.dtype) * jnp.moveaxis(weights, 1, 2)[..., None]
    extra = -values.shape[1] % chunk_size
    k, values = (jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)]) for x in (k, values))

    @jax.checkpoint
    def added(k, values):
        features = kernel.features(jnp.moveaxis(k.astype(values.dtype), 1, -1))  # [B, K, P, C]
        return jnp.einsum("bkpc,bcke->bkpe", features, values)

    B, _, K, D = k.shape
    if state is None:
        total = jnp.zeros((B, K, kernel.num_features(D), values.shape[-1]), gates.dtype)
    else:
        left = state_decay(kernel, jnp.exp(remaining[..., 0]))
        total = jnp.where((inputs.runs[:, -1] == 0)[:, None, None, None], left, 0.0) * state
    return jax.lax.scan(
        lambda total, chunk: (total + added(*chunk), None), total, (_chunks(k, chunk_size), _chunks(values, chunk_size))
    )[0]


def _chunks(x: Array, chunk_size: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)


def _gates(inputs: LinearInputs, chunk_size: int) -> Array:
    """The log gates as [N, B, K, C] or [N, B, K, D, C]."""
    return jnp.moveaxis(_chunks(inputs.log_gates, chunk_size), 2, -1)
