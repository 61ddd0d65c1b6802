"""Linear time: dense weights inside each chunk of C tokens, a state between the chunks."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float, accumulation_dtype


def chunked(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv+1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv+1"], Float[Array, "B K P Dv+1"]]:
    """Returns [num, den] of every row and the final state; see the package docstring for the equations."""
    T = inputs.k.shape[1]
    inputs = pad_time(inputs, chunk_size)
    N = inputs.k.shape[1] // chunk_size
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], N, chunk_size, *x.shape[2:]), 1, 0), inputs)
    last_run = jnp.concatenate([jnp.zeros_like(split.runs[:1, :, -1]), split.runs[:-1, :, -1]])

    def step(state, chunk_and_run):
        return _chunk(kernel, state, *chunk_and_run)

    state, out = jax.lax.scan(jax.checkpoint(step), state, (split, last_run))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T], state


def _chunk(kernel: Kernel, state: Array, chunk: LinearInputs, last_run: Array) -> tuple[Array, Array]:
    """One chunk: reads the state that the chunks before it left, then adds its own keys."""
    dtype = accumulation_dtype(chunk.q, chunk.k, chunk.v)
    q, k = chunk.q.astype(dtype), chunk.k.astype(dtype)
    values = extend_values(chunk.v.astype(dtype), chunk.valid)
    runs, C = chunk.runs, k.shape[1]
    log_decay = _log_decay(jnp.moveaxis(chunk.log_gates, 1, 2))  # [B, K, C + 1, C + 1]

    row, column = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    visible = (runs[:, :, None] == runs[:, None, :]) & (row >= column)[None]
    decay = jnp.exp(jnp.where(visible[:, None], log_decay[:, :, 1:, 1:], -jnp.inf))
    weights = kernel.weight(jnp.einsum("btkgd,bskd->bkgts", q, k)) * decay[:, :, None]
    out = jnp.einsum("bkgts,bske->btkge", weights, values)

    from_state = jnp.where((runs == last_run[:, None])[:, None], jnp.exp(log_decay[:, :, 1:, 0]), 0.0)
    out += jnp.einsum("btkgp,bkpe->btkge", kernel.features(q), state) * jnp.moveaxis(from_state, 2, 1)[..., None, None]
    update = jnp.einsum("bskp,bske->bkpe", kernel.features(k), values * jnp.moveaxis(decay[:, :, -1], 2, 1)[..., None])
    return from_state[:, :, -1, None, None] * state + update, out


def _log_decay(log_gates: Array) -> Array:
    """The sum of the log gates after token j up to token i, for i, j in -1 .. C-1; exact whole parts keep it precise."""
    whole = jnp.round(log_gates)
    total = 0.0
    for part in (whole, log_gates - whole):
        sums = jnp.pad(jnp.cumsum(part, axis=-1), [(0, 0)] * (part.ndim - 1) + [(1, 0)])
        total = total + (sums[..., :, None] - sums[..., None, :])
    return total
