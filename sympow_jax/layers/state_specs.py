"""Which mesh axes cut the state of a stream: rows lie over data and fsdp, heads and features over tensor."""

import jax
from jax.sharding import PartitionSpec as P

from sympow_jax import ops, sharding
from sympow_jax.typing import PyTree


def state_specs(state: PyTree) -> PyTree:
    """The axes of each array of a state, of one layer or of all; rows that do not divide are whole on every device.

    Finite states, learned phases and caches have their heads in the second dim; what windows and convolutions keep of
    the last tokens is [B, W, heads or features, ...], or [B, W] for positions and segment ids.
    """
    return jax.tree.map(_specs, state, is_leaf=lambda part: isinstance(part, _WHOLE))


_WHOLE = (ops.LinearState, ops.positions.PhaseState, ops.cache.KVCache)


def _specs(part: PyTree) -> PyTree:
    leaves = jax.tree.leaves(part)
    rows = sharding.dividing(leaves[0].shape[0], sharding.BATCH) if leaves[0].ndim else None
    alone, heads, late = P(rows), P(rows, "tensor"), P(rows, None, "tensor")
    if isinstance(part, ops.LinearState):
        return ops.LinearState(state=heads, normalizer=heads, segment_id=alone)
    if isinstance(part, ops.positions.PhaseState):
        return ops.positions.PhaseState(integer=heads, fraction=heads, segment_id=alone)
    if isinstance(part, ops.cache.KVCache):
        return ops.cache.KVCache(
            keys=heads, values=heads, positions=alone, gates=None if part.gates is None else (late, late)
        )
    return late if part.ndim > 2 else alone
