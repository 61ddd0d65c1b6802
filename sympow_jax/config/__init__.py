"""Run configuration: from a locked ConfigDict, or a saved config.json, to checked frozen dataclasses.

This is the only package that knows ml_collections. `parse_flags` reads a command line, `resolve` turns the user's
values into a `Config` with every "variant", "auto" and 0 replaced, and raises ConfigError, one line, for anything
that is misspelt, out of range or contradictory, before anything is compiled or written.
"""

from sympow_jax.config.absent import resolve_saved
from sympow_jax.config.architecture import check_scaling_acts
from sympow_jax.config.errors import ConfigError, RunError, nearest, require
from sympow_jax.config.files import config_folder, config_names, load_file, load_values
from sympow_jax.config.flags import INIT_FLAGS, initial_weights_flags, parse_flags, parse_points, parse_variants
from sympow_jax.config.layer_specs import (
    LayerSpec,
    absolute_position,
    attention_specs,
    describe_layers,
    layer_specs,
    linear_specs,
    positions,
)
from sympow_jax.config.resolve import override, resolve
from sympow_jax.config.schema import (
    TASKS,
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PositionConfig,
    TaskConfig,
)
from sympow_jax.config.values import check_numbers, diff, flatten, parse_value

__all__ = [
    "INIT_FLAGS",
    "TASKS",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LayerSpec",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PositionConfig",
    "RunError",
    "TaskConfig",
    "absolute_position",
    "attention_specs",
    "check_numbers",
    "check_scaling_acts",
    "config_folder",
    "config_names",
    "describe_layers",
    "diff",
    "flatten",
    "initial_weights_flags",
    "layer_specs",
    "linear_specs",
    "load_file",
    "load_values",
    "nearest",
    "override",
    "parse_flags",
    "parse_points",
    "parse_value",
    "parse_variants",
    "positions",
    "require",
    "resolve",
    "resolve_saved",
]
