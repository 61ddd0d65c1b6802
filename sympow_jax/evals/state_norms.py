"""How large the finite states of a stream are: one number for the state of each layer, and one for its normaliser."""

import jax.numpy as jnp

from sympow_jax.config import Config, layer_specs
from sympow_jax.ops import LinearState
from sympow_jax.typing import Array, Float, PyTree


def linear_layers(config: Config) -> list[int]:
    """The layers that keep a finite state: those of a linear kernel, or none where a layer cannot be streamed.

    Caches, windows and convolutions keep the last tokens as they are, and have no such state.
    """
    specs = layer_specs(config)
    if not all(spec.streams for spec in specs):
        return []
    return [n for n, spec in enumerate(specs) if spec.mixer == "attention" and spec.attention.is_linear]


def state_norms(state: PyTree) -> list[Float[Array, "B 2"]]:
    """Root mean squares of (state, normaliser) over heads, features and values, of each of `linear_layers` in turn.

    sqrt(mean S^2) = |S|_F / sqrt(number of entries), so that layers, degrees and head dims compare.

    Args:
      state: of a stream, from `Model.initial_state` or a call.
    """
    runs = (state[f"blocks_{number}"] for number in range(len(state) - 1))  # beside the offset
    kernels = [layer.get("kernel") for run in runs for layer in run]
    return [
        jnp.stack([_root_mean_square(kernel.state), _root_mean_square(kernel.normalizer)], axis=-1)
        for kernel in kernels
        if isinstance(kernel, LinearState)
    ]


def _root_mean_square(x: Array) -> Float[Array, "B"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim))))
