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


def _along_diagonals(row: Float[Array, "H M"], q_positions: Int[Array, "C"], k_positions: Int[Array, "C"]) -> jax.Array:
    """A block [H, C, C] of consecutive positions from the bias of every distance from M - 2 C - 1 down to -2 C."""
    (H, M), C = row.shape, q_positions.size
    start = (M - 2 * C - 1) - (q_positions[0] - k_positions[0] + C - 1)
    part = jax.lax.dynamic_slice_in_dim(row, start, 2 * C, axis=1)
    # Query i of the block starts C - 1 - i further on: rows of 2 C numbers, read as rows of one less.
    rows = jnp.broadcast_to(part[:, None], (H, C, 2 * C)).reshape(H, -1)
    return rows[:, C - 1 : -1].reshape(H, C, 2 * C - 1)[:, :, :C]


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

    @property
    def of_distance(self) -> bool:
        """Whether it sees the distance of a pair alone."""
        return isinstance(self.function, OfDistance)

    def on_consecutive(self, num_positions: int, block_size: int) -> "PositionBias":
        """The same for blocks of positions 0..num_positions - 1; of an `OfDistance`, each distance is evaluated once.

        It is for pairs of blocks whose last query is not before the first key.
        """
        if not isinstance(self.function, OfDistance):
            return self
        falling = num_positions - 1 - jnp.arange(num_positions + 2 * block_size, dtype=jnp.int32)
        return PositionBias(self.function.function(self.params, falling), _along_diagonals)
