"""Reading an initial state and writing a final one, for the forms that do not carry a state themselves.

Inside, tokens are columns of chunks, [N, R, D, C] with the rows R = B K, as in `chunked`.
"""

import functools

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.dispatch import measured_length
from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.ops.linear_attention.kernels import Kernel, state_decay
from sympow_jax.ops.linear_attention.rows import by_rows
from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, Float


def read_state(kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"]) -> Float[Array, "B T K G Dv1"]:
    """exp(G_i) phi(q_i) . state for the rows of the run that the state belongs to, zeros at once of an empty one."""
    B, T, K, G, _ = inputs.q.shape
    P, e = state.shape[2:]
    size = _chunk_length(T, P)
    decay, q = jnp.exp(jnp.cumsum(inputs.log_gates, axis=1)), inputs.q.astype(state.dtype)
    if inputs.has_vector_gates:
        decay, q = jnp.ones_like(decay[..., 0]), q * decay[:, :, :, None]
    decay = jnp.where((inputs.runs == 0)[..., None], decay, 0.0)
    q = _columns(q.swapaxes(2, 3).reshape(B, T * G, K, -1), G * size)
    out: Array = _read(kernel, q, jnp.swapaxes(state, 2, 3).reshape(B * K, e, P))
    out = jnp.transpose(out.reshape(-1, B, K, e, size, G), (1, 0, 4, 2, 5, 3)).reshape(B, -1, K, G, e)[:, :T]
    return out * decay[..., None, None]


def write_state(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"] | None, size: int | None = None
) -> Float[Array, "B K P Dv1"]:
    """exp(G_T) state + sum_j exp(G_T - G_j) phi(k_j) [v_j, 1]^T over the run of the last token, `size` at a time.

    A plain sum, so that its gradient needs no states in between. Without a size, chunks have the measured length.
    """
    gates, k = jnp.moveaxis(inputs.log_gates, 1, -1), inputs.k
    remaining = jnp.flip(jnp.cumsum(jnp.flip(gates, -1), -1), -1)  # G_T - G_(j-1), j = 1 .. T
    after = jnp.pad(remaining[..., 1:], [(0, 0)] * (gates.ndim - 1) + [(0, 1)])  # G_T - G_j
    decay = jnp.exp(after)
    if inputs.has_vector_gates:
        k, decay = k.astype(gates.dtype) * jnp.moveaxis(decay, -1, 1), jnp.ones_like(decay[:, :, 0])
    weights = jnp.where((inputs.runs == inputs.runs[:, -1:])[:, None], decay, 0.0)
    values = extend_values(inputs.v, inputs.valid).astype(gates.dtype) * jnp.moveaxis(weights, 1, 2)[..., None]
    B, T, K, D = k.shape
    P, e = kernel.num_features(D), values.shape[-1]
    size = size or _chunk_length(T, P)
    if state is None:
        total = jnp.zeros((B, K, P, e), gates.dtype)
    else:
        left = state_decay(kernel, jnp.exp(remaining[..., 0]))
        total = jnp.where((inputs.runs[:, -1] == 0)[:, None, None, None], left, 0.0) * state

    @jax.checkpoint
    def added(k, values):
        return jnp.einsum("rpc,rec->rpe", kernel.features(k), values)

    def sums(tokens, total):
        return None, jax.lax.scan(lambda total, chunk: (total + added(*chunk), None), total, tokens)[0]

    tokens = _columns(k.astype(gates.dtype), size), _columns(values, size)
    _, total = by_rows(sums, tokens, total.reshape(B * K, P, e), features=P * size, axis=1)
    return total.reshape(B, K, P, e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(kernel: Kernel, q: Float[Array, "N R D C"], state: Float[Array, "R Dv1 P"]) -> Float[Array, "N R Dv1 C"]:
    """state . phi(q). An empty state, as that of a prompt's start, is not read: the branch waits for a GPU's host."""
    if target_platform() == "gpu":
        return _read_any(kernel, q, state)
    unread = (*q.shape[:2], state.shape[1], q.shape[3])
    return jax.lax.cond(
        jnp.any(state != 0), lambda: _read_any(kernel, q, state), lambda: jnp.zeros(unread, state.dtype)
    )


def _read_any(kernel: Kernel, q: Array, state: Array) -> Array:
    @jax.checkpoint
    def chunk(q, state):
        return jnp.einsum("rep,rpc->rec", state, kernel.features(q))

    def chunks(q, state):
        return jax.lax.scan(lambda _, q: (None, chunk(q, state)), None, q)[1], None

    return by_rows(chunks, q, state, features=state.shape[2] * q.shape[3], axis=1)[0]


# The gradient of an empty state is that of any other.
_read.defvjp(
    lambda kernel, q, state: jax.vjp(functools.partial(_read_any, kernel), q, state), lambda _, pull, dout: pull(dout)
)


def _chunk_length(T: int, num_features: int) -> int:
    """Tokens at a time, whatever the blocks of the pairs."""
    return min(T, measured_length("chunked", num_features))


def _columns(x: Float[Array, "B T K D"], size: int) -> Float[Array, "N R D C"]:
    """The tokens in chunks of `size`, zeros after the last one."""
    B, T, K, D = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % size), (0, 0), (0, 0)]).reshape(B, -1, size, K, D)
    return jnp.transpose(x, (1, 0, 3, 4, 2)).reshape(-1, B * K, D, size)
