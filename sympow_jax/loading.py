"""A trained model from its workdir, for notebooks, evaluation and generation."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from sympow_jax.config import Config, ConfigError, check_scaling_acts, flatten, linear_specs, override, positions
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer
from sympow_jax.models.model import Model, on_this_platform
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.run_files import load_config, load_vocab_size
from sympow_jax.training.train_state import abstract_params
from sympow_jax.typing import PyTree
from sympow_jax.variants import ROTARY_POSITIONS, VARIANTS

_YARN = (
    "position.beta_fast", "position.beta_slow", "position.truncate", "position.attention_factor", "position.mscale",
    "position.mscale_all_dim",
)  # fmt: skip
_LLAMA3 = ("position.low_freq_factor", "position.high_freq_factor")
AT_EVALUATION = (
    "position.base", "position.scaling", "position.factor", "position.original_length", "position.alibi_slope_scale",
    *_YARN, *_LLAMA3,
    "attention.implementation", "attention.chunk_size", "model.dtype",
)  # fmt: skip

QUADRATIC = ("reference", "blockwise")  # implementations that read whole sequences only


def load(
    workdir: str,
    step: str | int = "latest",
    *,
    overrides: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, PyTree, Tokenizer]:
    """The model, its parameters and its tokeniser.

    Args:
      workdir: of a run; only data in it is read, nothing is executed.
      step: "latest", "best" (lowest held-out loss) or a step number.
      overrides: settings that do not belong to the parameters, such as {"position.scaling": "yarn"}.
      mesh: devices that the model is spread over, each parameter read where it lives; None is one device.

    Raises:
      FileError, CheckpointError, ConfigError: one line that says what is missing or wrong.
    """
    model, params, _ = load_step(workdir, step, overrides=overrides, mesh=mesh)
    return model, params, load_tokenizer(pathlib.Path(workdir) / "tokenizer")


def load_step(
    workdir: str,
    step: str | int = "latest",
    *,
    overrides: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, PyTree, int]:
    """As `load`, with the number of the step that was read in place of the tokeniser."""
    config = evaluation_config(on_this_platform(load_config(workdir)), overrides or {})
    model = Model(config, load_vocab_size(workdir), mesh)
    like = {"params": abstract_params(model)}
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        restored = checkpointer.restore(step, like=like)
    return model, restored.tree["params"], restored.step


def evaluation_config(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with settings that one checkpoint can be evaluated under.

    Raises:
      ConfigError: a setting that belongs to the parameters, or one that the architecture does not read.
    """
    for path in overrides:
        if path not in AT_EVALUATION:
            raise ConfigError(f"--{path}: cannot change after training; these can: {', '.join(AT_EVALUATION)}")
    changed = override(config, overrides)
    for path in overrides:
        if not _acts(changed, path):
            scales = "rope" in positions(config) and changed.position.scaling == "none"
            raise ConfigError(
                f"--{path}: has no effect with {_state(changed, path)}; "
                + ("set --position.scaling too" if scales and path in _OF_SCALINGS else "leave it out")
            )
    if {"position.scaling", "position.factor"} & {*overrides}:
        check_scaling_acts(changed)
    return changed


_OF_SCALINGS = {
    "position.factor": ("linear", "ntk", "dynamic_ntk", "yarn", "llama3"),
    "position.original_length": ("dynamic_ntk", "yarn", "llama3"),
    **dict.fromkeys(_YARN, ("yarn",)),
    **dict.fromkeys(_LLAMA3, ("llama3",)),
}
_DECIDING = {  # what decides whether a setting is read
    "position.base": ("attention.position", "position.convention"),
    **dict.fromkeys(_OF_SCALINGS, ("attention.position", "position.scaling")),
    "position.alibi_slope_scale": ("attention.position",),
    "attention.chunk_size": ("attention.kernel", "attention.implementation"),
}


def _acts(config: Config, path: str) -> bool:
    """Whether the architecture reads this setting."""
    p, found = config.position, positions(config)
    if path == "position.base":
        return bool({*found} & {*ROTARY_POSITIONS}) and p.convention == "standard"
    if path in _OF_SCALINGS:
        return p.scaling in _OF_SCALINGS[path]
    if path == "position.alibi_slope_scale":
        return "alibi" in found
    if path == "attention.chunk_size":
        return bool(linear_specs(config)) and config.attention.implementation not in ("reference", "recurrent")
    return True


def _state(config: Config, path: str) -> str:
    values, names = flatten(config), _DECIDING[path]
    if {*config.attention.layer_pattern} & {*VARIANTS}:
        names = ("attention.layer_pattern", *names)
    return " and ".join(f"{name} = {values[name]!r}" for name in names)


def check_stream(config: Config, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError for an attention.implementation by which a stream of tokens cannot be read.

    The quadratic forms read whole sequences. A linear kernel reads a stream by a linear form, and softmax by its cache,
    whatever the setting says.
    """
    chosen, linear = config.attention.implementation, linear_specs(config)
    if "attention.implementation" in overrides and not (linear and chosen not in QUADRATIC):
        hint = "use chunked or recurrent" if linear else "leave it out"
        raise ConfigError(
            f"--attention.implementation = {chosen!r}: has no effect where {config.variant} reads a text "
            f"as a stream; {hint}"
        )
