"""What to measure of a run, checked, and the record of everything that its numbers depend on."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from sympow_jax.config import TASKS, Config, ConfigError, check_numbers, flatten, nearest, require
from sympow_jax.evals.length_summary import default_lengths
from sympow_jax.files import json_sha256
from sympow_jax.input_pipeline.tasks.task_store import KINDS
from sympow_jax.training.manifest import CheckpointError, read_manifest

LENGTH_GENERALISATION, REMEMBRANCE = OF_TEXT = ("length_generalisation", "remembrance")
NEEDLE = "needle"
RETRIEVAL_TASKS = (*TASKS, NEEDLE)
NUM_EXAMPLES = {name: kind.num_examples for name, kind in KINDS.items()} | {NEEDLE: 32}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
POSITION_BIAS = "position_bias"
MAX_TASK_LENGTH = 2**24  # a question is made as a whole, in some hundred bytes a token
MEASUREMENT = 2  # counts up when the same inputs would give other numbers

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_SETTINGS = ("variant", "seed", "data.seq_len", "evaluation.chunk_size", "model.", "attention.", "position.", "task.")
_WITHOUT_EFFECT = ("model.remat", "model.scan_layers")  # on any number


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """What to measure of a run.

    Attributes:
      workdir: the run; results go to workdir/eval/<name>.{json,npz,png}.
      task: LENGTH_GENERALISATION, REMEMBRANCE or one of RETRIEVAL_TASKS.
      lengths: contexts in tokens; the columns of a task's grid. REMEMBRANCE is of the longest.
      data: the store that is scored, or that a needle is hidden in.
      name: of the result files.
      step: "latest", "best" or a number.
      overrides: settings that do not belong to the parameters (loading.AT_EVALUATION), as text.
      num_documents: of text.
      window, stride: of length generalisation; window 0 is off.
      num_examples, pairs, depths: of a task's grid, as far as it has these axes.
      mesh: sizes by axis of the devices to measure on (see training.evaluation_mesh); no number depends on it.

    Raises:
      ConfigError: a value out of range, or a name that is no plain file name.
    """

    workdir: str
    task: str
    lengths: tuple[int, ...]
    data: str
    name: str
    step: str | int = "latest"
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_documents: int = 0
    window: int = 0
    stride: int = 0
    num_examples: int = 0
    pairs: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_numbers("--lengths", self.lengths, least=1)
        if self.task in OF_TEXT:
            check_numbers("--lengths", (max(self.lengths),), least=2)
        if self.task == LENGTH_GENERALISATION:
            check_numbers("--num_documents", (self.num_documents,), least=1)
            self._check_window()
            return
        if self.task == REMEMBRANCE:
            hint = ", as the tokens of one document are replaced by those of another"
            check_numbers("--num_documents", (self.num_documents,), least=2, hint=hint)
            return
        check_task(self.task)
        check_numbers("--lengths", self.lengths, least=1, most=MAX_TASK_LENGTH)
        check_numbers("--num_examples", (self.num_examples,), least=1)
        if "pairs" in grid_axes(self.task):
            check_numbers("--pairs", self.pairs, least=1)
        if "depths" in grid_axes(self.task):
            check_numbers("--depths", self.depths, least=0, most=1)

    def _check_window(self) -> None:
        w, s = self.window, self.stride
        if (w, s) != (0, 0) and not 0 < s <= w <= max(self.lengths):
            raise ConfigError(
                f"--window = {w}, --stride = {s}: give both, 0 < stride <= window <= {max(self.lengths)}, the longest "
                "length"
            )


def lengths_of(config: Config, task: str) -> tuple[int, ...]:
    """The contexts of an evaluation that names none; curves of loss begin below the trained one."""
    lengths = config.evaluation.lengths
    return default_lengths(config.data.seq_len, lengths) if task == LENGTH_GENERALISATION else lengths


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is the plain name of result files, and not one that eval.py itself uses."""
    require(
        bool(_NAME.fullmatch(name)),
        f"--name = {name!r}: names files under WORKDIR/eval; use up to 100 letters, digits, '_', '-' and '.', not '.' "
        "first",
    )
    require(
        name != POSITION_BIAS and not name.endswith(f".{POSITION_BIAS}"),
        f"--name = {name!r}: the biases and gates of an evaluation are written there; use another name",
    )


def bias_name(name: str) -> str:
    """Of the files with the biases and gates of the evaluation `name`."""
    return POSITION_BIAS if name == LENGTH_GENERALISATION else f"{name}.{POSITION_BIAS}"


def check_task(name: str) -> None:
    """Raises ConfigError for a task that does not exist."""
    if name not in RETRIEVAL_TASKS:
        hint = nearest(name, RETRIEVAL_TASKS)
        raise ConfigError(f"--task = {name!r}: choose one of {', '.join(RETRIEVAL_TASKS)}{hint}")


def grid_axes(task: str) -> tuple[str, ...]:
    """What a task's grid has besides lengths: pairs, depths or nothing."""
    axis = "depths" if task == NEEDLE else KINDS[task].axis
    return (axis,) if axis else ()


def inputs(request: EvaluationRequest, config: Config, step: int, data_digest: str) -> dict[str, Any]:
    """Everything that the numbers of an evaluation depend on, as JSON types: equal inputs give equal numbers.

    Args:
      request: what is asked.
      config: the run's, with the overrides of the request.
      step: of the checkpoint; its parameters enter by their digests.
      data_digest: of the documents that are scored or a needle is hidden in; "" for tasks without any.
    """
    axes, lengths = ("num_documents", "window", "stride"), sorted(request.lengths)
    if request.task == REMEMBRANCE:
        axes, lengths = ("num_documents",), lengths[-1:]
    elif request.task != LENGTH_GENERALISATION:
        axes = ("num_examples", *grid_axes(request.task))
    found = {
        "measurement": MEASUREMENT,
        "task": request.task,
        "lengths": lengths,
        **{axis: getattr(request, axis) for axis in axes},
        "step": step,
        "parameters": _parameters_digest(request.workdir, step),
        "data": data_digest,
        "settings": {
            path: value
            for path, value in flatten(config).items()
            if path.startswith(_SETTINGS) and path not in _WITHOUT_EFFECT
        },
    }
    return json.loads(json.dumps(found))


def _parameters_digest(workdir: str, step: int) -> str:
    """sha256 over the digests of a checkpoint's parameters; what the optimizer holds does not count."""
    folder = pathlib.Path(workdir) / "checkpoints" / str(step)
    try:
        arrays = read_manifest(folder)["arrays"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder}: its manifest cannot be read ({error})") from None
    kept = {name: entry for name, entry in arrays.items() if name.startswith("params/")}
    return f"sha256:{json_sha256(kept)}"
