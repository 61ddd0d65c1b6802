"""The arrays of a state by name, and how a mesh cuts them: rows by data and fsdp, heads and features by tensor."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from sympow_jax import ops, sharding
from sympow_jax.typing import PyTree


def named_arrays(state: PyTree, separator: str = "/") -> dict[str, Any]:
    """The arrays of a state by name, "blocks_0/1/kernel/state", in the order in which JAX flattens it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


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
        twin = None if part.twin is None else heads
        return ops.positions.PhaseState(integer=heads, fraction=heads, segment_id=alone, twin=twin)
    if isinstance(part, ops.cache.KVCache):
        return ops.cache.KVCache(
            keys=heads, values=heads, positions=alone, gates=None if part.gates is None else (late, late)
        )
    return late if part.ndim > 2 else alone
