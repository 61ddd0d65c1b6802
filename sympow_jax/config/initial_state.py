"""Which configurations can train from a state that is not empty."""

from sympow_jax.config.errors import require
from sympow_jax.config.layer_specs import absolute_position, layer_specs
from sympow_jax.config.schema import Config


def check_initial_state(config: Config) -> None:
    """Raises ConfigError where training.initial_state asks for a state that the run cannot pass on."""
    how, o = config.training.initial_state, config.optimizer
    if how == "zero":
        return
    name = f"training.initial_state = {how!r}"
    for spec in layer_specs(config):
        require(
            spec.streams_constant,
            f"{name}: a layer of {spec.attention.kernel} attention keeps a cache that grows with the context; use "
            "zero, or a model of linear kernels, windows and convolutions",
        )
    require(
        how != "carried" or config.data.order == "stream",
        f"{name}: goes on where the batch before ended, and data.order = {config.data.order!r} does not; use "
        "--config.data.order=stream, or other_document",
    )
    require(
        absolute_position(config) == "none" and config.position.scaling != "dynamic_ntk",
        f"{name}: absolute positions and dynamic_ntk depend on the length of the stream, which has no end; use another "
        "position",
    )
    unlike = {
        "optimizer.accumulation_steps": o.accumulation_steps > 1,
        "attention.blend_steps": config.attention.blend_steps > 0,
        "optimizer.distill_layers": o.distill_layers > 0,
        "optimizer.distill_logits": o.distill_logits > 0,
    }
    for key, used in unlike.items():
        require(not used, f"{name}: does not go together with {key}; leave one of them at its default")
