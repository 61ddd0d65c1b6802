"""From the user's values to a checked, frozen `Config` with every "variant", "auto" and 0 replaced."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from sympow_jax import variants
from sympow_jax.config.architecture import longest
from sympow_jax.config.checks import check_combinations, check_values
from sympow_jax.config.errors import require_known
from sympow_jax.config.layer_specs import absolute_position, attention_specs
from sympow_jax.config.schema import Config
from sympow_jax.config.values import build, flatten, parse_value


def resolve(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Fills in "variant", "auto" and 0, checks every field and their combinations, and freezes the result.

    Args:
      values: nested mapping with exactly the keys of configs/default.py (a ConfigDict or a saved config.json).

    Raises:
      ConfigError: one line naming the field, its value, what is legal and how to fix it.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = build(Config, values)
    check_values({"variant": config.variant})
    row = variants.VARIANTS[config.variant]
    m, a, p = config.model, config.attention, config.position
    pick = {name: getattr(row, name) for name in ("kernel", "position", "gate", "gate_init")}
    attention = dataclasses.replace(
        a,
        **{name: choice if getattr(a, name) == "variant" else getattr(a, name) for name, choice in pick.items()},
        layer_pattern=row.layer_pattern if a.layer_pattern == ("variant",) else a.layer_pattern,
    )
    mlp_bias = ("all" if m.mlp in ("gelu", "gelu_exact") else "none") if m.mlp_bias == "auto" else m.mlp_bias
    config = dataclasses.replace(config, attention=attention)
    rotation = p.rotation
    learned = {spec.position.rotation for spec in attention_specs(config) if spec.attention.position == "learned_rope"}
    if rotation == "variant" and len(learned) < 2:  # rows of a pattern that differ keep theirs
        rotation = next(iter(learned), "scalar")
    uses_max_length = absolute_position(config) == "learned_absolute" or p.convention == "manifest"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(m, num_kv_heads=m.num_kv_heads or m.num_heads, mlp_bias=mlp_bias),
        position=dataclasses.replace(
            p,
            rotation=rotation,
            original_length=p.original_length or config.data.seq_len,
            max_length=p.max_length or (longest(config) if uses_max_length else 0),
        ),
    )
    check_values(flatten(config))
    check_combinations(config)
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted keys changed and everything checked again: override(c, {"position.scaling": "yarn"})."""
    known = flatten(config)
    tree = dataclasses.asdict(config)
    for path, value in changes.items():
        require_known(f"{path}: no such key", path, list(known))
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = parse_value(value, known[path], path) if isinstance(value, str) else value
    return resolve(tree)
