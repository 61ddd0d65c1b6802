"""The table of forms: the same sums, computed in different orders."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.accelerators import pallas
from sympow_jax.ops.linear_attention.blockwise import blockwise
from sympow_jax.ops.linear_attention.chunked import chunked
from sympow_jax.ops.linear_attention.dispatch import Implementation
from sympow_jax.ops.linear_attention.inputs import LinearInputs, LinearState, normalise
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.recurrent import recurrent
from sympow_jax.ops.linear_attention.reference import reference, reference_state
from sympow_jax.ops.linear_attention.state import write_state
from sympow_jax.typing import Array, Float

Result = tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"] | None]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A form that carries the state: (kernel, inputs, [S, z], size) -> (num / den, [S, z] after the last token)."""

    attend: Callable[[Kernel, LinearInputs, Array, int], tuple[Array, Array]]

    def __call__(
        self, kernel: Kernel, inputs: LinearInputs, state: LinearState | None, size: int, *, with_state: bool
    ) -> Result:
        """num / den, and the state after the last token, which costs nothing more."""
        del with_state
        B, _, K, Dv = inputs.v.shape
        if state is not None:
            return self.attend(kernel, inputs, extended(state, inputs), size)
        empty = jnp.zeros((B, K, kernel.num_features(inputs.k.shape[-1]), Dv + 1), inputs.log_gates.dtype)
        return self.attend(kernel, inputs, empty, size)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A form over pairs of tokens: (kernel, inputs, [S, z] or None, size) -> [num, den]; the state takes no size."""

    attend: Callable[[Kernel, LinearInputs, Array | None, int], Array]
    final_state: Callable[[Kernel, LinearInputs, Array | None], Array]

    def __call__(
        self, kernel: Kernel, inputs: LinearInputs, state: LinearState | None, size: int, *, with_state: bool
    ) -> Result:
        """num / den, and the state after the last token or, as it can be huge, None."""
        before = None if state is None else extended(state, inputs)
        out = normalise(self.attend(kernel, inputs, before, size), axis=-1)
        return out, self.final_state(kernel, inputs, before) if with_state else None


FORMS: dict[Implementation, Linear | Quadratic] = {
    "reference": Quadratic(reference, reference_state),
    "blockwise": Quadratic(blockwise, write_state),
    "chunked": Linear(chunked),
    "recurrent": Linear(recurrent),
    "pallas": Linear(pallas),
}


def extended(state: LinearState, inputs: LinearInputs) -> Float[Array, "B K P Dv1"]:
    """[S, z], in the dtype of the sums."""
    return jnp.concatenate([state.state, state.normalizer[..., None]], axis=-1).astype(inputs.log_gates.dtype)
