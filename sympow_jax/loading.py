"""A trained model from its workdir, for notebooks, evaluation and generation."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from sympow_jax.config import Config, ConfigError, override
from sympow_jax.files import read_json
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer
from sympow_jax.models.model import Model
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.run_files import load_config
from sympow_jax.typing import PyTree
from sympow_jax.variants import ROTARY_POSITIONS

AT_EVALUATION = (
    "position.base", "position.scaling", "position.factor", "position.original_length", "position.alibi_slope_scale",
    "attention.implementation", "attention.chunk_size", "model.dtype",
)  # fmt: skip


def load(
    workdir: str, step: str | int = "latest", *, overrides: Mapping[str, Any] | None = None
) -> tuple[Model, PyTree, Tokenizer]:
    """The model, its parameters and its tokeniser.

    Args:
      workdir: of a run; only data in it is read, nothing is executed.
      step: "latest", "best" (lowest held-out loss) or a step number.
      overrides: settings that do not belong to the parameters, such as {"position.scaling": "yarn"}.

    Raises:
      FileError, CheckpointError, ConfigError: one line that says what is missing or wrong.
    """
    model, params, _ = load_step(workdir, step, overrides=overrides)
    return model, params, load_tokenizer(pathlib.Path(workdir) / "tokenizer")


def load_step(
    workdir: str, step: str | int = "latest", *, overrides: Mapping[str, Any] | None = None
) -> tuple[Model, PyTree, int]:
    """As `load`, with the number of the step that was read in place of the tokeniser."""
    config = evaluation_config(load_config(workdir), overrides or {})
    model = Model(config, read_json(pathlib.Path(workdir) / "data.json")["vocab_size"])
    like = {"params": jax.eval_shape(model.init, jax.random.key(0))}
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        restored = checkpointer.restore(step, like=like)
    return model, restored.tree["params"], restored.step


def evaluation_config(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with settings that one checkpoint can be evaluated under."""
    for path in overrides:
        if path not in AT_EVALUATION:
            raise ConfigError(f"--{path}: cannot change after training; these can: {', '.join(AT_EVALUATION)}")
    changed = override(config, overrides)
    rotary, scaled = config.attention.position in ROTARY_POSITIONS, changed.position.scaling != "none"
    has_effect = {"position.base": rotary, "position.factor": scaled, "position.original_length": scaled}
    for path in overrides:
        if not has_effect.get(path, True):
            raise ConfigError(
                f"--{path}: has no effect with attention.position = {config.attention.position!r} and "
                f"position.scaling = {changed.position.scaling!r}; "
                + ("set --position.scaling too" if rotary else "leave it out")
            )
    return changed
