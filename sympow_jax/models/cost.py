"""What a stream of a model holds in memory and costs per token, from shapes alone."""

from typing import Any

import jax

from sympow_jax.config import Config, linear_specs, override
from sympow_jax.models import flops
from sympow_jax.models.model import Model
from sympow_jax.models.state_bytes import state_bytes


def stream_cost(config: Config, vocab_size: int, length: int) -> dict[str, Any] | None:
    """Parameters, bytes of state (of softmax: the cache at `length`) and forward FLOPs of a token there.

    Products are counted exactly, by the cheaper form of a kernel. None for models that do not stream.
    """
    model = Model(config, vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if not model.streams:
        return None
    state = state_bytes(config, jax.eval_shape(lambda: model.initial_state(1, length)))
    forms = [override(config, {"attention.implementation": "chunked"})] if linear_specs(config) else []
    attention = min(flops.attention_flops_per_token(form, length) for form in [config, *forms])
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": sum(state.values()),
        "state_bytes_by_kind": state,
        "constant": model.streams_constant,
        "length": length,
        "flops_per_token": attention + 2.0 * flops.matrix_parameters(config, params),
    }
