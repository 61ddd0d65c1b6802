"""How large the state of a stream is, by kinds of layers."""

import math

import jax

from sympow_jax.config import Config, LayerSpec
from sympow_jax.models.transformer import layer_runs
from sympow_jax.typing import PyTree


def state_bytes(config: Config, state: PyTree) -> dict[str, int]:
    """{name in the layer pattern: bytes of the states or caches of all layers of that name}.

    Args:
      config: of the model.
      state: from `Model.initial_state` or its shapes.
    """
    found: dict[str, int] = {}
    for i, (spec, _) in enumerate(layer_runs(config)):
        leaves = jax.tree.leaves(state[f"blocks_{i}"])
        found[spec.name] = found.get(spec.name, 0) + sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return found


def describe_state(config: Config, state: PyTree) -> str:
    """Bytes of each kind of layers, and whether they grow with the text: `conformal_sympow 1,024 (constant), ...`."""
    specs: dict[str, LayerSpec] = {spec.name: spec for spec, _ in layer_runs(config)}
    sizes = state_bytes(config, state).items()
    return ", ".join(
        f"{name} {size:,} ({'constant' if specs[name].streams_constant else 'cache'})" for name, size in sizes
    )
