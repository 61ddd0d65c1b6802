"""Work on few rows at a time, so that the features of a chunk stay in the caches of a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.dispatch import CACHED_FEATURES
from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, PyTree


def by_rows(
    function: Callable[[PyTree, Array], tuple[PyTree, PyTree]],
    tokens: PyTree,
    state: Array,
    *,
    features: int,
    axis: int,
) -> tuple[PyTree, PyTree]:
    """function(tokens, state) -> (arrays of the tokens, state): all rows of both, as many at a time as the caches hold.

    Args:
      tokens: arrays with the rows along `axis`, as in those that the function makes of them.
      state: rows first, as in what the function makes of it.
      features: numbers that the function expands of a row at once.
    """
    R, rows = state.shape[0], state.shape[0]
    if target_platform() == "cpu":
        rows = max(r for r in range(1, R + 1) if R % r == 0 and (r == 1 or r * features <= CACHED_FEATURES))
    if rows == R:
        return function(tokens, state)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        return jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : axis + 1], R, *x.shape[axis + 2 :])

    parts = jax.tree.map(cut, tokens), state.reshape(-1, rows, *state.shape[1:])
    out, after = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(join, out), jax.tree.map(lambda x: x.reshape(R, *x.shape[2:]), after)
