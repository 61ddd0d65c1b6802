"""Where the numbers of a run go: metrics.jsonl (the record), TensorBoard, a progress line, and W&B if asked for.

A sink that fails is reported once and never stops training. Only process 0 of a multi-process run writes.
"""

import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sympow_jax.config import ConfigError
from sympow_jax.files import (
    FileError,
    entry,
    open_regular,
    parse_json,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

METRICS_NAME, WANDB_NAME = "metrics.jsonl", "wandb.json"
_ROW_START, _MAX_ROW_BYTES = b'{"step": ', 2**20  # of the lines that are written here
_MAX_BYTES = 2 * 2**30  # some five million rows
_MAX_NAMED = 5  # lines in warnings

TextStream = TextIO | io.TextIOWrapper | io.StringIO

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes rows of metrics to every sink.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      resume_step: the restored step; rows past it are dropped everywhere. None for a new run.
      total_steps: for the progress line.
      tensorboard: write event files through tensorboardX.
      wandb_project: name of a Weights & Biases project; "" for none. wandb is imported only then.
      config: sent to W&B with the run.
      stream: where the progress goes; None for standard error.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None,
        total_steps: int,
        tensorboard: bool = True,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
        stream: TextStream | None = None,
    ):
        workdir = pathlib.Path(workdir)
        makers: dict[str, Callable[[], Any]] = {"metrics.jsonl": lambda: _Jsonl(workdir / METRICS_NAME, resume_step)}
        if tensorboard:
            makers["TensorBoard"] = lambda: _TensorBoard(workdir / "tensorboard", resume_step)
        if wandb_project:
            makers["W&B"] = lambda: _Wandb(workdir, wandb_project, config or {})
        makers["the progress line"] = lambda: _ProgressLine(total_steps, stream or sys.stderr)
        if jax.process_index() > 0:
            makers = {}
        self._reported: set[str] = set()
        self._sinks: dict[str, Any] = {}
        for name, make in makers.items():
            sink = self._guard(name, make)
            if sink is not None:
                self._sinks[name] = sink

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. Write every row of a step before the step's checkpoint, so that a resume loses none."""
        row = {"step": int(step)} | {key: _plain(value) for key, value in values.items()}
        for name, sink in self._sinks.items():
            self._guard(name, lambda sink=sink: sink.write(row))

    def message(self, text: str) -> None:
        """Prints a line without disturbing the progress display."""
        sink = self._sinks.get("the progress line")
        if sink is not None:
            self._guard("the progress line", lambda: sink.message(text))

    def close(self) -> None:
        """Flushes and closes every sink."""
        for name, sink in self._sinks.items():
            self._guard(name, sink.close)
        self._sinks = {}

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guard(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            if name not in self._reported:
                self._reported.add(name)
                log.warning(
                    "%s cannot be written (%s: %s); training continues without it", name, type(error).__name__, error
                )
            return None


def check_wandb(project: str) -> None:
    """Raises ConfigError when a Weights & Biases project is named and the package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project = {project!r}: the wandb package is not installed; pip install "
            "'sympow_jax[wandb]', or leave the key empty"
        )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a line that is none, torn by a kill or damaged, is left out and named in a warning."""
    rows, others = _read(path)
    for number, why in list(others.items())[:_MAX_NAMED]:
        log.warning("%s, line %d: is left out: %s", path, number, why or "the row was not written to its end")
    if len(others) > _MAX_NAMED:
        log.warning("%s: %d lines that are no rows are left out", path, len(others))
    return rows


def last_logged_step(workdir: str | os.PathLike) -> int:
    """The highest step in a workdir's metrics.jsonl; 0 when there is none."""
    path = pathlib.Path(workdir) / METRICS_NAME
    return max((row["step"] for row in _read(path)[0]), default=0) if path.exists() else 0


def _read(path: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The rows, and by their numbers from 1 the other lines: what is wrong, "" for the mere beginning of a row."""
    rows, others = [], {}
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > _MAX_BYTES:
            raise FileError(f"{path}: has {size:,} bytes; at most {_MAX_BYTES:,} are read")
        for number, line in enumerate(iter(lambda: file.readline(_MAX_ROW_BYTES), b""), start=1):
            try:
                row = parse_json(line, "no row of metrics")
                entry(row, "step", int, "no row of metrics", least=0, most=2**53)
                rows.append(row)
            except FileError as error:
                text = line.rstrip()
                torn = text.startswith(_ROW_START[: len(text)]) and not text.endswith(b"}")
                others[number] = "" if torn else str(error)
    return rows, others


def _plain(value: Any) -> Any:
    """A JSON value: numbers as int or float, non-finite ones as None (JSON has no NaN)."""
    if isinstance(value, str | bool) or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Jsonl:
    def __init__(self, path: pathlib.Path, resume_step: int | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_aside(path)
            kept = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
            write_text_atomic(path, "".join(_line(row) for row in kept))
        self._file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._torn = False

    def write(self, row: Mapping[str, Any]) -> None:
        data = (("\n" if self._torn else "") + _line(row)).encode()
        self._torn = True
        if os.write(self._file, data) != len(data):
            raise OSError("the disk is full")
        self._torn = False

    def close(self) -> None:
        os.close(self._file)


def _keep_aside(path: pathlib.Path) -> None:
    """Copies a file with lines that are no rows: it is about to be written again without them."""
    if any(_read(path)[1].values()):
        names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
        copy = next(name for name in names if not os.path.lexists(name))
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            write_bytes_atomic(copy, lambda out: shutil.copyfileobj(file, out))
        log.warning("%s: as it was, with lines that are no rows, it is kept as %s", path, copy.name)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({"step": row["step"]} | dict(sorted(row.items())), allow_nan=False) + "\n"


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, resume_step: int | None):
        from tensorboardX import SummaryWriter  # slow to import; a run may do without

        first = 0 if resume_step is None else resume_step + 1  # TensorBoard hides older events from here on
        self._writer = SummaryWriter(str(folder), purge_step=first, filename_suffix=f".from{first}")

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]  (an optional extra)

        self._run = wandb.init(
            project=project,
            name=workdir.resolve().name,
            dir=str(workdir),
            config=dict(config),
            id=_wandb_id(workdir),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _wandb_id(workdir: pathlib.Path) -> str:
    """The id of the workdir's run, drawn once: folders of one name must not share a run.

    A run that W&B knew before ids were kept, and so left its folder `wandb`, has the name of the workdir.
    """
    path = workdir / WANDB_NAME
    if not path.exists():
        known = (workdir / "wandb").is_dir()
        write_json_atomic(path, {"id": workdir.resolve().name if known else secrets.token_hex(8)})
    return entry(read_json(path), "id", str, str(path))


class _ProgressLine:
    """A live bar on a terminal; elsewhere one plain line a row."""

    _UNITS = {
        "tokens_per_sec": "tok/s", "mfu": "MFU", "loss": "loss", "heldout_loss": "heldout",
        "heldout_accuracy": "accuracy", "grad_norm": "grad",
    }  # fmt: skip

    def __init__(self, total_steps: int, stream: TextStream):
        self._total, self._stream, self._bar = total_steps, stream, None
        if stream.isatty():
            from rich.console import Console

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def write(self, row: Mapping[str, Any]) -> None:
        text = "  ".join(self._pieces(row))
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        else:
            print(f"step {row['step']}/{self._total}  {text}", file=self._stream, flush=True)

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _pieces(self, row: Mapping[str, Any]) -> list[str]:
        pieces = []
        for key, unit in self._UNITS.items():
            value = row.get(key)
            if isinstance(value, int | float):
                text = {"tokens_per_sec": f"{value:,.0f}", "mfu": f"{100 * value:.1f}%"}.get(key, f"{value:.4g}")
                pieces.append(f"{unit} {text}")
        seconds = self._remaining_seconds(row)
        if seconds is not None:
            pieces.append(f"ETA {_duration(seconds)}")
        return pieces

    def _remaining_seconds(self, row: Mapping[str, Any]) -> float | None:
        """Training time left at the current tokens/s; evaluation is not counted."""
        if not row.get("tokens") or not row.get("tokens_per_sec") or not row["step"]:
            return None
        return (self._total - row["step"]) * row["tokens"] / row["step"] / row["tokens_per_sec"]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"
