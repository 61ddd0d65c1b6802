"""What a run writes once, config.json, data.json and the tokeniser, and the rules for continuing it."""

import dataclasses
import fnmatch
import pathlib
import re

import jax

from sympow_jax.config import TASKS, Config, ConfigError, check_scaling_acts, diff, require, resolve_saved
from sympow_jax.files import entry, read_json, write_json_atomic
from sympow_jax.input_pipeline.opening import parse_mixture
from sympow_jax.input_pipeline.tokenizer_base import MAX_VOCABULARY
from sympow_jax.models.model import on_this_platform, resolve_implementation
from sympow_jax.training.data import RunData
from sympow_jax.training.workdir import refuse_links

MAY_CHANGE = (
    "num_train_steps", "logging.*", "evaluation.*", "checkpoint.*", "mesh.*", "model.remat", "model.scan_layers",
    "optimizer.accumulation_steps", "optimizer.max_skipped_steps", "data.prefetch_batches", "data.num_threads",
    "data.cache_bytes",
)  # fmt: skip
LEARNING_RATE = (
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.final_fraction",
    "optimizer.decay_fraction", "optimizer.learning_rates",
)  # fmt: skip

_STORES = ("data.train", "data.heldout")


def load_config(workdir: str) -> Config:
    """The configuration saved in a workdir; a FileError where links lead out of it (see workdir.refuse_links)."""
    refuse_links(workdir)
    path = pathlib.Path(workdir) / "config.json"
    try:
        return resolve_saved(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_vocab_size(workdir: str) -> int:
    """The size of the vocabulary that a workdir's run was trained on."""
    path = pathlib.Path(workdir) / "data.json"
    return entry(read_json(path), "vocab_size", int, str(path), least=1, most=MAX_VOCABULARY)


def resolve_for(config: Config, workdir: str) -> Config:
    """`config` with its implementation chosen, as the workdir's run chose it, or, in a new workdir, now.

    And with the number of this process's CPU devices; 1 where it has an accelerator.
    """
    devices = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, cpu_devices=devices))
    if config.attention.implementation == "auto" and (pathlib.Path(workdir) / "config.json").exists():
        chosen = on_this_platform(load_config(workdir)).attention
        attention = dataclasses.replace(config.attention, implementation=chosen.implementation)
        if attention.chunk_size == 0:
            attention = dataclasses.replace(attention, chunk_size=chosen.chunk_size)
        config = dataclasses.replace(config, attention=attention)
    return resolve_implementation(config)


def check_resume(config: Config, workdir: str, *, allow_learning_rate_change: bool = False) -> None:
    """Prints what changed against the workdir's config and raises ConfigError if a resume may not change it.

    A new run may not start with a position.scaling that does nothing, or with a seed of more than 32 bits. Stores may
    lie elsewhere than before: whether they hold the same, `check_data` decides by their digests.
    """
    if not (pathlib.Path(workdir) / "config.json").exists():
        check_scaling_acts(config)
        require(
            config.seed < 2**32,
            f"seed = {config.seed}: parameters are drawn from its last 32 bits alone, which another seed has too; use "
            f"at most {2**32 - 1}",
        )
        return
    changes = diff(load_config(workdir), config)
    for path, (old, new) in changes.items():
        regroups = path.startswith("mesh.") or path == "model.scan_layers"
        note = "; sums are split otherwise, and losses may differ in their last bits" if regroups else ""
        print(f"config change: {path}: {old!r} -> {new!r}{note}")
    refused = [path for path in changes if not any(fnmatch.fnmatch(path, pattern) for pattern in MAY_CHANGE)]
    if (pathlib.Path(workdir) / "data.json").exists():
        refused = [path for path in refused if not (path in _STORES and _mixed_alike(changes[path]))]
    rates = [path for path in refused if path in LEARNING_RATE]
    if rates and not allow_learning_rate_change:
        raise ConfigError(
            f"{rates[0]}: differs from the run in {workdir}; pass --allow_learning_rate_change to continue with it, or "
            "use another --workdir"
        )
    refused = [path for path in refused if path not in rates]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: differs from the run in {workdir}, which cannot continue with it; restore the "
            "value or use another --workdir"
        )


def _mixed_alike(specs: tuple[str, str]) -> bool:
    """Whether two names of data are stores, not tasks, mixed alike."""
    return not {*specs} & {*TASKS} and parse_mixture(specs[0])[1] == parse_mixture(specs[1])[1]


_ROWS = r"/rows:[0-9a-f]{64}"


def check_data(workdir: str, data: RunData) -> None:
    """Raises ConfigError when the run in `workdir` was trained on other data than `data`."""
    path = pathlib.Path(workdir) / "data.json"
    changes = diff(read_json(path), data.describe()) if path.exists() else {}
    # a file of before digests said which rows of a store are there
    changes = {field: (old, new) for field, (old, new) in changes.items() if re.sub(_ROWS, "", str(new)) != str(old)}
    if changes:
        field, (old, new) = next(iter(changes.items()))
        raise ConfigError(
            f"data.{field}: the run in {workdir} was trained on {old!r}, and this machine has {new!r}; train in "
            "another --workdir, or name the original store with --config.data.train and --config.data.heldout"
        )


def save_run_files(config: Config, workdir: str, data: RunData) -> None:
    """Writes config.json, data.json and the tokeniser; raises ConfigError when the run's data was another."""
    check_data(workdir, data)
    write_json_atomic(pathlib.Path(workdir) / "data.json", data.describe())
    write_json_atomic(pathlib.Path(workdir) / "config.json", dataclasses.asdict(config))
    data.tokenizer.save(pathlib.Path(workdir) / "tokenizer")
