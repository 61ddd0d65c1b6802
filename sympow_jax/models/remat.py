"""What a layer keeps for its backward pass, and what it computes again (config key model.remat).

| policy    | kept on the device                           | computed again                |
|-----------|----------------------------------------------|-------------------------------|
| none      | everything                                   | nothing                       |
| dots      | outputs of projections and of attention      | norms, activations, rotations |
| attention | the layer's input, the outputs of attention  | projections and MLP too       |
| block     | the layer's input                            | the whole layer               |
| offload   | nothing: input and attention outputs wait in host memory | as under attention |

The operations tag what their backward pass needs of their forward pass (outputs, normalisers, chunk states) with
`checkpoint_name(..., "attention")`, so that a policy that keeps it never runs attention a third time; cuDNN's attention
has no names, and is known by its primitive (`offload`, which goes by names, runs it again). On a GPU `chunked` tags no
chunk states: they are many, and their sums are made again.
"""

from collections.abc import Callable
from typing import Any

import jax

from sympow_jax.config import ConfigError
from sympow_jax.ops.residuals import ATTENTION, PROJECTION

BLOCK_INPUT = "block_input"
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def rematerialise(layer: Callable, policy: str) -> Callable:
    """`layer`, a function whose backward pass keeps only what `policy` says; the results are the same."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    either = policies.save_from_both_policies
    attention = either(policies.save_only_these_names(ATTENTION), _is_cudnn)
    products = either(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PROJECTION))
    chosen = {
        "block": policies.nothing_saveable,
        "attention": attention,
        "dots": either(products, attention),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT, ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    return jax.checkpoint(layer, policy=chosen)


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == CUDNN_FORWARD


def check_backend(policy: str) -> None:
    """Raises ConfigError when this machine cannot run `policy`; compiling for another one is not affected."""
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if policy == "offload" and not {"device", "pinned_host"} <= kinds:
        raise ConfigError(
            f"model.remat = 'offload': {jax.default_backend()} devices have no separate host memory to offload to; "
            "use 'attention' or 'block'"
        )
