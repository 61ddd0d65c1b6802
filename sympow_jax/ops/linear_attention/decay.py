"""Cumulative gates: local sums kept exact, and only differences exponentiated."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Bool, Float, Int


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

    def carry(self, kernel: Kernel) -> Float[Array, "R 1 1"]:
        """What is left of a state after the chunk, whatever the kernel."""
        del kernel
        return self.from_state[..., -1][:, None, None]

    def of_queries(self, q: Float[Array, "R D GC"]) -> Float[Array, "R D GC"]:
        """Queries as they read the state before the chunk: the decay is that of what they read."""
        return q

    def of_keys(self, k: Float[Array, "R D C"]) -> Float[Array, "R D C"]:
        """Keys as the state after the chunk holds them: the decay is that of their values."""
        return k

    def scores(self, q: Float[Array, "R D GC"], k: Float[Array, "R D C"]) -> Float[Array, "R C GC"]:
        """Scores of the pairs inside the chunk, key by query: the decay is that of their weights."""
        return jnp.einsum("rdj,rdi->rji", k, q)

    def of_pairs(self) -> Float[Array, "R C C"]:
        """exp(G_i - G_j) for key j (rows) and query i (columns) of the chunk, 0 where i does not see j."""
        whole = self.whole[:, None, :] - self.whole[:, :, None]
        rest = self.rest[:, None, :] - self.rest[:, :, None]
        return jnp.exp(jnp.where(causal_runs(self.runs), whole + rest, -jnp.inf))


def chunk_decay(log_gates: Float[Array, "*N R C"], runs: Int[Array, "*N R C"]) -> ChunkDecay:
    """What tokens read of the state before their chunk and leave to the state after it: nothing across a new run."""
    whole, rest = whole_and_rest(log_gates)
    sees, is_seen = reach(runs)
    from_state = jnp.where(sees, jnp.exp(whole + rest), 0.0)
    to_end = (whole[..., -1:] - whole) + (rest[..., -1:] - rest)
    to_state = jnp.where(is_seen, jnp.exp(to_end), 0.0)
    return ChunkDecay(whole, rest, runs, from_state, to_state)


def reach(runs: Int[Array, "*N R C"]) -> tuple[Bool[Array, "*N R C"], Bool[Array, "*N R C"]]:
    """Whether a token is of the run before its chunk, and of the run that its chunk ends with."""
    last = runs.reshape(-1, *runs.shape[2:])[..., -1]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]]).reshape(runs.shape[:-1])[..., None]
    return runs == before, runs == runs[..., -1:]


def causal_runs(runs: Int[Array, "R C"]) -> Bool[Array, "R C C"]:
    """Whether query i (columns) of a chunk sees key j (rows): j <= i, in one run."""
    C = runs.shape[-1]
    causal = jnp.arange(C)[:, None] <= jnp.arange(C)[None, :]
    return causal[None] & (runs[:, :, None] == runs[:, None, :])


def whole_and_rest(gates: Array) -> tuple[Array, Array]:
    """The cumulative sums over the last axis of the gates' nearest integers and of what remains."""
    whole = jnp.round(gates)
    return jnp.cumsum(whole, axis=-1), jnp.cumsum(gates - whole, axis=-1)


def left_at_end(log_gates: Float[Array, "R T"], runs: Int[Array, "R T"]) -> Float[Array, "R T"]:
    """What is left of each token after the last, 0 of other runs than its.

    Sums from the end are small where most is left, however long the row is.
    """
    whole = jnp.round(log_gates)
    after = sum(jax.lax.cumsum(x, axis=1, reverse=True) - x for x in (whole, log_gates - whole))
    return jnp.where(runs == runs[:, -1:], jnp.exp(after), 0.0)


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
