"""What a trained model does with distance: its additive biases and its gates, per layer and head.

    curve_h(d) = bias_h(i, i - d)  +  d * mean log gate_h

for one query position i; the mean is over the tokens of some held-out text, so for data-dependent gates the second
term is the decay of a typical key. Vector gates decay a score by the mean of exp(d * mean log gate) over the dims, and
the weight by that to the degree of the kernel (1 for Taylor's). 0 means "no preference"; -5 leaves less than 1% of the
weight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import sharding
from sympow_jax.layers.attention import Attention
from sympow_jax.models.model import Model
from sympow_jax.typing import Array, Float, Integer, PyTree


def distance_curves(
    model: Model, params: PyTree, tokens: Integer[np.ndarray, "B T"], *, query_position: int
) -> dict[str, Any]:
    """{"query_position", "distance": [...], "layers": [{"layer", "log_weight": [H, distance]}]}.

    Layers without a bias or gate are left out; under a linear kernel heads are kv heads.

    Args:
      model, params: a trained model.
      tokens: held-out text, over which data-dependent gates are averaged.
      query_position: i; distances are log-spaced up to it.
    """
    distance = np.unique(np.geomspace(1, query_position, 64).astype(np.int64))
    distance = np.concatenate([[0], distance])

    @functools.partial(jax.jit, out_shardings=sharding.everywhere(model.mesh))
    def curves(params, tokens):
        found = {}
        with sharding.use_mesh(model.mesh):
            for layer, mixer, x, context in model.bind(params).layer_inputs(tokens):
                if isinstance(mixer, Attention):
                    found[layer] = _layer_curve(mixer, x, context, jnp.asarray(distance, jnp.int32), query_position)
        return {layer: curve for layer, curve in found.items() if curve is not None}

    layers = jax.device_get(curves(params, np.asarray(tokens, np.int32)))
    return {
        "variant": model.config.variant,
        "query_position": query_position,
        "distance": distance.tolist(),
        "layers": [{"layer": layer, "log_weight": curve.tolist()} for layer, curve in sorted(layers.items())],
    }


def _layer_curve(
    mixer: Attention, x: Array, context, distance: Array, query_position: int
) -> Float[Array, "H d"] | None:
    bias, log_gates = mixer.bias(context), mixer.log_gates(x)
    if bias is None and log_gates is None:
        return None
    curve = jnp.zeros((1, distance.shape[0]))
    if bias is not None:
        query = jnp.asarray([query_position], jnp.int32)
        curve = curve + bias(query, query_position - distance)[:, 0, :]
    if log_gates is not None and log_gates.ndim == 4:
        decays = jnp.mean(log_gates, axis=(0, 1))[..., None] * distance[None, None, :].astype(jnp.float32)
        degree = {"power": mixer.attention.degree, "rebased": 2, "taylor": 1}[mixer.kernel]
        curve = curve + degree * (jax.nn.logsumexp(decays, axis=1) - jnp.log(decays.shape[1]))
    elif log_gates is not None:
        curve = curve + jnp.mean(log_gates, axis=(0, 1))[:, None] * distance[None, :].astype(jnp.float32)
    return curve
