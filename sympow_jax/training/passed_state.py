"""The state that a batch begins with: empty, or made of what the batch before left behind.

Linear models fail beyond the trained length for want of states that training never showed them; training from states
that are not empty is the cure of Buitrago and Gu (arXiv 2507.02782): states passed on (truncated backpropagation
through time), noise fitted to their size, or the state of another sequence. No gradient goes into a batch before.
"""

import jax
import jax.numpy as jnp

from sympow_jax.models.model import Model
from sympow_jax.ops import LinearState
from sympow_jax.typing import Array, PyTree


def empty_stream(model: Model) -> PyTree:
    """What a run begins with: the empty state of a batch, or None where training.initial_state is zero."""
    d = model.config.data
    return None if model.config.training.initial_state == "zero" else model.initial_state(d.batch_size, d.seq_len)


def state_before(model: Model, left: PyTree, batch: PyTree, step: Array) -> PyTree:
    """The state before the first token of a batch, None for an empty one.

    carried: `left`, what the batch before left behind, and empty where documents begin.
    noise and other_document: every second batch, from the first on, begins with nothing, so that what it leaves behind
    is of its own tokens alone (noise that is fitted to states which began with noise grows without bound where nothing
    decays). Those between begin with `left` of the row before, as if it were seq_len tokens long; or with noise of
    `left`'s root mean square in each layer and head, from the seed and the step, for the state of linear kernels, with
    the mean of the normalisers, which stay positive, and all else empty.
    """
    how, d = model.config.training.initial_state, model.config.data
    if how == "zero":
        return None
    empty, left = empty_stream(model), jax.lax.stop_gradient(left)
    begins = jnp.all(batch["tokens_before"] == 0) if how == "carried" else step % 2 == 0
    if how == "noise":
        left = _with_noise(empty, left, jax.random.fold_in(jax.random.key(model.config.seed), step))
    elif how == "other_document":
        left = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0) if x.ndim else jnp.minimum(x, d.seq_len), left)
    return jax.tree.map(lambda new, old: jnp.where(begins, new, old), empty, left)


def state_after_skip(model: Model, left: PyTree, before: PyTree) -> PyTree:
    """What a batch whose step is not applied leaves behind: as if it had not been read, but documents began with it."""
    return before if model.config.training.initial_state == "carried" else left


def _with_noise(empty: PyTree, left: PyTree, key: Array) -> PyTree:
    keys = iter(jax.random.split(key, _num_kernels(left)))
    return jax.tree.map(
        lambda new, old: _noise(next(keys), new, old) if _is_kernel(old) else new, empty, left, is_leaf=_is_kernel
    )


def _is_kernel(node: PyTree) -> bool:
    return isinstance(node, LinearState)


def _num_kernels(state: PyTree) -> int:
    return sum(_is_kernel(node) for node in jax.tree.leaves(state, is_leaf=_is_kernel))


def _noise(key: Array, empty: LinearState, left: LinearState) -> LinearState:
    size = jnp.sqrt(jnp.mean(jnp.square(left.state), axis=(0, 2, 3), keepdims=True))
    state = size * jax.random.normal(key, left.state.shape, left.state.dtype)
    mean = jnp.broadcast_to(jnp.mean(left.normalizer, axis=0, keepdims=True), left.normalizer.shape)
    return LinearState(state, mean, empty.segment_id)
