"""Additive attention biases that are functions of positions, evaluated block by block."""

import dataclasses
from collections.abc import Callable

import jax

from sympow_jax.typing import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionBias:
    """A bias b_h(i, j) added to the logits of softmax attention, or to the log-weights of a linear kernel.

    Attributes:
      params: the arrays it depends on (learned or fixed); attention returns gradients for all of them.
      function: (params, q_positions [q], k_positions [k]) -> [H, q, k], float32. Static, so define it at module
        level: two biases with the same function share one compiled program. It must give finite values (and
        gradients) for every pair, also where k_position > q_position; masking is the caller's.
    """

    params: PyTree
    function: Callable[[PyTree, jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})

    def __call__(self, q_positions: Int[Array, "*B q"], k_positions: Int[Array, "*B k"]) -> Float[Array, "*B H q k"]:
        """Evaluates the bias on a block; positions may carry a batch dimension (packed documents)."""
        function = self.function
        if q_positions.ndim == 2:
            return jax.vmap(lambda q, k: function(self.params, q, k))(q_positions, k_positions)
        return function(self.params, q_positions, k_positions)
