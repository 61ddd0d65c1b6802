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

    whole: Float[Array, "*N R C"]
    rest: Float[Array, "*N R C"]
    runs: Int[Array, "*N R C"]
    from_state: Float[Array, "*N R C"]
    to_state: Float[Array, "*N R C"]
    carry: Float[Array, "*N R"]


def chunk_decay(log_gates: Float[Array, "*N R C"], runs: Int[Array, "*N R C"]) -> ChunkDecay:
    """What tokens read of the state before their chunk and leave to the state after it: nothing across a new run."""
    last = runs.reshape(-1, *runs.shape[2:])[..., -1]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]]).reshape(runs.shape[:-1])[..., None]
    whole, rest = whole_and_rest(log_gates)
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
    dcumulative: Float[Array, "*N R C"], at_end: Float[Array, " R"], runs: Int[Array, "*N R C"]
) -> Float[Array, "*N R C"]:
    """From gradients of the cumulative gates to those of the gates: a reverse cumulative sum inside each run."""
    *N, R, C = runs.shape
    d, run = (jnp.swapaxes(x.reshape(-1, R, C), 0, 1).reshape(R, -1) for x in (dcumulative, runs))
    d = d.at[:, -1].add(at_end)
    changed = run[:, 1:] != run[:, :-1]
    last = jnp.pad(changed, [(0, 0), (0, 1)], constant_values=True)
    first = jnp.concatenate([run[:, :1] != 0, changed], axis=1)

    def add(later, earlier):
        return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

    sums, _ = jax.lax.associative_scan(add, (d, last), axis=1, reverse=True)
    sums = jnp.where(first, 0.0, sums)
    return jnp.swapaxes(sums.reshape(R, -1, C), 0, 1).reshape(*N, R, C)
