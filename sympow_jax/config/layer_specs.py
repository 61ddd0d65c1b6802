"""What each layer of a model is: its mixer and, where that is attention, its kernel, position, gate and options.

This is the one place that reads `attention.layer_pattern`. Whatever depends on a kernel, a position or a gate asks the
layers, since no two of them need to have the same.
"""

import collections
import dataclasses

from sympow_jax import variants
from sympow_jax.config.errors import require, require_known
from sympow_jax.config.schema import AttentionConfig, Config, ModelConfig, PositionConfig


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer; layers with equal specs have parameters of equal shapes and compute the same.

    Attributes:
      name: the word of attention.layer_pattern: a kind of variants.LAYER_KINDS, or a row of the variants table.
      mixer: attention | gated_conv | short_conv.
      attention: the options of this layer: kernel, position and gate are its own, and an `implementation` that only
        linear kernels have is "auto" in the others.
      position: settings of its position encoding; scaled in layers with rope only, and its rotation, scalar or
        frequency, is scalar where none is learned.
      window: tokens that a query sees, itself included; None for all.
    """

    name: str
    mixer: str
    attention: AttentionConfig
    position: PositionConfig
    window: int | None

    @property
    def streams_constant(self) -> bool:
        """Whether what the layer keeps of a stream has a size that does not depend on its length."""
        return self.mixer != "attention" or self.window is not None or (self.attention.is_linear and self.streams)

    @property
    def streams(self) -> bool:
        """Whether the layer can read a stream; a linear kernel with an additive bias keeps neither state nor cache."""
        return self.mixer != "attention" or not (self.attention.is_linear and self.attention.has_additive_bias)

    def qk_head_dim(self, model: ModelConfig) -> int:
        """head_dim of queries and keys."""
        return self.attention.feature_dim if self.attention.uses_feature_dim else model.head_dim


def layer_specs(config: Config) -> tuple[LayerSpec, ...]:
    """The spec of each layer: the layer pattern, repeated over the depth.

    `attention` is the layer of attention.kernel, .position and .gate, and `window` the same in softmax over the last
    attention.window tokens; a row of the variants table is its attention layer.

    Raises:
      ConfigError: a word that is neither a kind nor a row, or no word at all.
    """
    pattern, made = config.attention.layer_pattern, _specs(config)
    return tuple(made[pattern[number % len(pattern)]] for number in range(config.model.num_layers))


def attention_specs(config: Config) -> tuple[LayerSpec, ...]:
    """The different layers that attend; where all are convolutions, the one that attention.kernel would be."""
    made = _specs(config)
    used = dict.fromkeys(config.attention.layer_pattern[: config.model.num_layers])
    specs = tuple(made[name] for name in used if made[name].mixer == "attention")
    return specs or (_spec("attention", config),)


def linear_specs(config: Config) -> tuple[LayerSpec, ...]:
    """The different layers with a linear kernel."""
    return tuple(spec for spec in attention_specs(config) if spec.attention.is_linear)


def positions(config: Config) -> tuple[str, ...]:
    """The position encodings of the layers that attend, each of them once."""
    return tuple(dict.fromkeys(spec.attention.position for spec in attention_specs(config)))


def absolute_position(config: Config) -> str:
    """The encoding that is added to the embeddings, which all layers see, or "none"."""
    return next((position for position in positions(config) if position in variants.ABSOLUTE_POSITIONS), "none")


def describe_layers(config: Config) -> str:
    """Kernel, position and gate: of the whole model, or of each row that its layer pattern names."""
    counts = collections.Counter(layer_specs(config))
    if not any(spec.name in variants.VARIANTS for spec in counts):
        return _axes(_spec("attention", config))
    axes = {spec: f" ({_axes(spec)})" if spec.mixer == "attention" else "" for spec in counts}
    return "; ".join(f"{depth} x {spec.name}{axes[spec]}" for spec, depth in counts.items())


def _axes(spec: LayerSpec) -> str:
    a, position = spec.attention, variants.position_name(spec.attention.position, spec.position.rotation)
    return f"kernel {a.kernel}, position {position}, gate {a.gate}"


def _specs(config: Config) -> dict[str, LayerSpec]:
    """The spec of each word of the layer pattern."""
    require(bool(config.attention.layer_pattern), "attention.layer_pattern = (): name one or more kinds of layers")
    return {name: _spec(name, config) for name in dict.fromkeys(config.attention.layer_pattern)}


def _spec(name: str, config: Config) -> LayerSpec:
    a, p = dataclasses.replace(config.attention, layer_pattern=()), config.position
    known = (*variants.LAYER_KINDS, *variants.VARIANTS)
    message = f"attention.layer_pattern has {name!r}: choose from {', '.join(variants.LAYER_KINDS)}, or a variant"
    require_known(message, name, known)
    window = a.window if name == "window" else None
    if window is not None:
        a = dataclasses.replace(a, kernel="softmax")
        p = dataclasses.replace(p, base=p.window_base, scaling="none") if p.window_base else p
    elif name in variants.VARIANTS:
        row = variants.VARIANTS[name]
        a = dataclasses.replace(a, kernel=row.kernel, position=row.position, gate=row.gate, gate_init=row.gate_init)
    if a.position != "rope":
        p = dataclasses.replace(p, scaling="none")
    row = variants.VARIANTS[name if name in variants.VARIANTS else config.variant]
    rotation = row.rotation if p.rotation == "variant" else p.rotation
    p = dataclasses.replace(p, rotation=rotation if a.position == "learned_rope" else "scalar")
    if a.is_linear_form and not a.is_linear:
        a = dataclasses.replace(a, implementation="auto")
    return LayerSpec(name, name if name in variants.CONVOLUTIONS else "attention", a, p, window)
