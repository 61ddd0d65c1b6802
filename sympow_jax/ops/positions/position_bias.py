"""Additive attention biases that are functions of positions, evaluated block by block."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sympow_jax.typing import Array, Float, Int, PyTree

Function = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OfDistance:
    """A bias function that sees the distance, query position minus key position, alone.

    Attributes:
      function: (params, distance [...]) -> [H, ...], float32, finite for every distance, negative ones too.
      pairs: the same of (params, q_positions, k_positions), where that costs less for arbitrary positions.
    """

    function: Callable[[PyTree, jax.Array], jax.Array]
    pairs: Function | None = None

    def __call__(self, params: PyTree, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> jax.Array:
        """[H, q, k], evaluated at every pair."""
        if self.pairs is not None:
            return self.pairs(params, q_positions, k_positions)
        return self.function(params, q_positions[:, None] - k_positions[None, :])


@dataclasses.dataclass(frozen=True)
class _OfConsecutive:
    """An `OfDistance` on positions that count up by one: evaluated at q + k distances and laid along the diagonals."""

    function: Callable[[PyTree, jax.Array], jax.Array]

    def __call__(self, params: PyTree, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> jax.Array:
        q, k = q_positions.size, k_positions.size
        falling = q_positions[0] - k_positions[0] + q - 1 - jnp.arange(q + k, dtype=jnp.int32)
        row = self.function(params, falling)
        # Row i of the block starts q - 1 - i further on: rows of q + k numbers, read as rows of one less.
        rows = jnp.broadcast_to(row[:, None], (row.shape[0], q, q + k)).reshape(row.shape[0], -1)
        return rows[:, q - 1 : -1].reshape(-1, q, q + k - 1)[:, :, :k]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionBias:
    """A bias b_h(i, j) added to the logits of softmax attention, or to the log-weights of a linear kernel.

    Attributes:
      params: the arrays it depends on (learned or fixed); attention returns gradients for all of them.
      function: (params, q_positions [q], k_positions [k]) -> [H, q, k], float32, or an `OfDistance`. Static, so define
        it at module level: two biases with the same function share one compiled program. It must give finite values
        (and gradients) for every pair, also where k_position > q_position; masking is the caller's.
    """

    params: PyTree
    function: Function = dataclasses.field(metadata={"static": True})

    def __call__(self, q_positions: Int[Array, "*B q"], k_positions: Int[Array, "*B k"]) -> Float[Array, "*B H q k"]:
        """Evaluates the bias on a block; positions may carry a batch dimension (packed documents)."""
        function = self.function
        if q_positions.ndim == 2:
            return jax.vmap(lambda q, k: function(self.params, q, k))(q_positions, k_positions)
        return function(self.params, q_positions, k_positions)

    def on_consecutive(self) -> "PositionBias":
        """The same for blocks of queries, and of keys, whose positions count up by one; cheaper if `OfDistance`."""
        if not isinstance(self.function, OfDistance):
            return self
        return dataclasses.replace(self, function=_OfConsecutive(self.function.function))
