"""The frozen original of optimizer.distill_layers and distill_logits: the model of --init_from, as it was then.

init_from.json records workdir, step and digest, so that a resumed run needs no flag and learns from the same arrays.
"""

import pathlib

from sympow_jax.config import ConfigError, diff
from sympow_jax.files import entry, read_json
from sympow_jax.models.model import Model, on_this_platform
from sympow_jax.training.checkpoint import Checkpointer, CheckpointError
from sympow_jax.training.initial_weights import RECORD, InitialWeights
from sympow_jax.training.objective import Teacher
from sympow_jax.training.run_files import load_config, load_vocab_size
from sympow_jax.training.train_state import abstract_params

_MAY_DIFFER = ("init_std", "dtype", "scan_layers", "remat", "loss_block")


def load_teacher(model: Model, workdir: str, initial: InitialWeights | None) -> Teacher | None:
    """The original that `model`'s run in `workdir` learns from, on its mesh; None where it learns from none.

    Raises:
      ConfigError: the run did not start from a workdir, or from a model of another shape.
      CheckpointError, FileError: what it started from is not there any more, or is no longer what it was.
    """
    o = model.config.optimizer
    if not o.distils:
        return None
    key = "distill_layers" if o.distill_layers else "distill_logits"
    source = _source(workdir, initial)
    if source is None:
        raise ConfigError(
            f"optimizer.{key} = {getattr(o, key)}: there is no original to learn from; start a new run with "
            "--init_from=WORKDIR, or use 0"
        )
    folder, step, digest = source
    config = on_this_platform(load_config(folder))
    changes = {name: pair for name, pair in diff(config.model, model.config.model).items() if name not in _MAY_DIFFER}
    if changes:
        name, (old, new) = next(iter(changes.items()))
        raise ConfigError(
            f"optimizer.{key}: the original in {folder} has model.{name} = {old!r}, and this model {new!r}; "
            f"use --config={folder}:VARIANT, or 0"
        )
    original = Model(config, load_vocab_size(folder), model.mesh)
    with Checkpointer(pathlib.Path(folder) / "checkpoints", read_only=True) as checkpointer:
        if checkpointer.digest(step) != digest:
            raise CheckpointError(
                f"{folder}: step {step} is not what the run in {workdir} started from; restore it from a copy"
            )
        restored = checkpointer.restore(step, like={"params": abstract_params(original)})
    return Teacher(original, restored.tree["params"])


def _source(workdir: str, initial: InitialWeights | None) -> tuple[str, int, str] | None:
    """Folder, step and digest of what the run starts, or has started, from."""
    path = pathlib.Path(workdir) / RECORD
    if not path.exists():
        return None if initial is None else (initial.workdir, initial.step, initial.digest)
    record = read_json(path)
    return tuple(entry(record, *key, str(path)) for key in (("workdir", str), ("step", int), ("digest", str)))
