"""From a family's values to a resolved `Config`, and which values of a `Config` decide what its model computes."""

from collections.abc import Mapping
from typing import Any

from sympow_jax import variants
from sympow_jax.config import Config, attention_specs, flatten, load_values, positions, resolve
from sympow_jax.convert.windows import layer_kinds

_RUNTIME = (
    "model.init_std", "model.dtype", "model.scan_layers", "model.remat", "model.loss_block",
    "attention.gate_init", "attention.implementation", "attention.chunk_size", "attention.blend_from",
    "attention.blend_steps",
)  # fmt: skip
_OF_YARN = (
    "position.beta_fast", "position.beta_slow", "position.truncate", "position.attention_factor", "position.mscale",
    "position.mscale_all_dim",
)  # fmt: skip
_LENGTHS = (512, 1024, 2048, 4096)


def make_config(ours: Mapping[str, Any]) -> Config:
    """The resolved configuration with these values, dotted keys; others are those of configs/default.py.

    Raises:
      ConfigError: a value that no model here may have.
    """
    tree = load_values("default", ours["variant"]).to_dict()
    longest = ours["data.seq_len"] if "position.max_length" in ours else max(_LENGTHS)
    lengths = tuple(length for length in _LENGTHS if length <= longest) or (longest,)
    for key, value in {"evaluation.lengths": lengths, **ours}.items():
        group, _, name = key.rpartition(".")
        (tree[group] if group else tree)[name] = value
    return resolve(tree)


def architecture(config: Config) -> dict[str, Any]:
    """The values that decide what a model with given parameters computes, by dotted key.

    What another value of the same configuration switches off is left out.
    """
    values = flatten(config)
    kinds = layer_kinds(values)
    a, p = config.attention, config.position
    layers = [spec.attention for spec in attention_specs(config)]
    kernels, found = {layer.kernel for layer in layers}, {*positions(config)}
    off = {*_RUNTIME, "attention.layer_pattern", "model.vocab_size"}
    unless = {
        ("attention.gate_min_timescale", "attention.gate_max_timescale"): "fixed" in {layer.gate for layer in layers},
        ("attention.window", "position.window_base"): "window" in kinds,
        ("attention.conv_width", "attention.conv_expand"): bool({*kinds} & {"gated_conv", "short_conv"}),
        ("attention.degree",): "power" in kernels,
        ("attention.rebased_norm",): "rebased" in kernels,
        ("attention.feature_dim",): any(layer.uses_feature_dim for layer in layers),
        ("attention.qk_norm_span", "attention.qk_norm_eps"): a.qk_norm,
        ("position.alibi_slope_scale",): "alibi" in found,
        ("position.max_length",): "learned_absolute" in found or p.convention == "manifest",
        ("position.base", "position.convention", "position.rotary_fraction"): bool(
            found & {*variants.ROTARY_POSITIONS}
        ),
        ("position.rotation", "position.rotation_rank"): "learned_rope" in found,
        ("position.factor",): p.scaling != "none",
        ("position.original_length",): p.scaling in ("dynamic_ntk", "yarn", "llama3"),
        _OF_YARN: p.scaling == "yarn",
        ("position.low_freq_factor", "position.high_freq_factor"): p.scaling == "llama3",
    }
    off |= {key for keys, acts in unless.items() if not acts for key in keys}
    kept = {key: value for key, value in values.items() if key.startswith(("model.", "attention.", "position."))}
    kept = {key: value for key, value in kept.items() if key not in off}
    return kept | {"attention.scale": a.scale or config.model.head_dim**-0.5, "layers": kinds}
