"""Cumulative gates: local sums kept exact, and only differences exponentiated."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkDecay:
    """The decays of N chunks, each relative to its own start or end; the rows are R = B K.

    `whole` + `rest` is the cumulative log gate from the start of the chunk. The whole numbers sum exactly and the
    rests stay below C / 2, so differences stay accurate after gates of any strength.
    """

    whole: Float[Array, "N R C"]
    rest: Float[Array, "N R C"]
    runs: Int[Array, "N R C"]
    from_state: Float[Array, "N R C"]
    to_state: Float[Array, "N R C"]
    carry: Float[Array, "N R"]


def chunk_decay(log_gates: Float[Array, "B T K"], runs: Int[Array, "B T"], chunk_size: int) -> ChunkDecay:
    """What each token reads of the state before its chunk and leaves to the state after it; 0 across a change of run."""
    B, T, K = log_gates.shape
    N = T // chunk_size
    gates = jnp.transpose(log_gates.reshape(B, N, chunk_size, K), (1, 0, 3, 2)).reshape(N, B * K, chunk_size)
    last_run = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, chunk_size - 1 : -1 : chunk_size]], axis=1)
    runs = jnp.repeat(jnp.moveaxis(runs.reshape(B, N, chunk_size), 1, 0), K, axis=1)
    before = jnp.repeat(last_run.T, K, axis=1)[..., None]
    whole, rest = whole_and_rest(gates)
    from_state = jnp.where(runs == before, jnp.exp(whole + rest), 0.0)
    to_end = (whole[..., -1:] - whole) + (rest[..., -1:] - rest)
    to_state = jnp.where(runs == runs[..., -1:], jnp.exp(to_end), 0.0)
    return ChunkDecay(whole, rest, runs, from_state, to_state, from_state[..., -1])


def whole_and_rest(gates: Array) -> tuple[Array, Array]:
    """The cumulative sums over the last axis of the gates' nearest integers and of what remains."""
    whole = jnp.round(gates)
    return jnp.cumsum(whole, axis=-1), jnp.cumsum(gates - whole, axis=-1)


def pair_decay(decay: ChunkDecay) -> Float[Array, "R C C"]:
    """exp(G_i - G_j) for key j (rows) and query i (columns) of one chunk, 0 where i does not see j."""
    C = decay.runs.shape[-1]
    causal = jnp.arange(C)[:, None] <= jnp.arange(C)[None, :]
    visible = causal[None] & (decay.runs[:, :, None] == decay.runs[:, None, :])
    log_decay = (decay.whole[:, None, :] - decay.whole[:, :, None]) + (decay.rest[:, None, :] - decay.rest[:, :, None])
    return jnp.exp(jnp.where(visible, log_decay, -jnp.inf))


def gate_gradient(
    dcumulative: Float[Array, "B K T"], at_end: Float[Array, "B K"], runs: Int[Array, "B T"]
) -> Float[Array, "B T K"]:
    """From gradients of the cumulative gates to those of the gates: a reverse cumulative sum inside each run."""
    dcumulative = dcumulative.at[:, :, -1].add(at_end)
    ends = jnp.concatenate([runs[:, 1:] != runs[:, :-1], jnp.ones_like(runs[:, :1], bool)], axis=1)[:, None]

    def combine(right, left):
        (sum_right, _), (sum_left, end_left) = right, left
        return jnp.where(end_left, sum_left, sum_left + sum_right), right[1] | end_left

    starts = jnp.broadcast_to(ends, dcumulative.shape)
    sums, _ = jax.lax.associative_scan(combine, (dcumulative, starts), axis=2, reverse=True)
    first = jnp.concatenate([runs[:, :1] != 0, runs[:, 1:] != runs[:, :-1]], axis=1)[:, None]
    return jnp.moveaxis(jnp.where(first, 0.0, sums), 1, 2)
