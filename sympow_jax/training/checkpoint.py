"""Checkpoints of plain nested dicts of arrays: atomic, asynchronous, and verified when they are read.

Layout, readable by Orbax alone (`StandardRestore` of item `state`):

    <directory>/<step>/state/       the arrays, written by Orbax
    <directory>/<step>/manifest/    JSON: step, metadata, metrics, and shape, dtype and digest of every array
    <directory>/<step>.damaged/     a step that failed verification, set aside when training went back to an older one

A step folder appears by one rename, after all its bytes are written. The digest (see `digests`) is taken from the live
arrays before the save and compared with the arrays as restored on the devices, so that damage anywhere on the way is
seen; it does not depend on the mesh.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sympow_jax.files import refuse_link
from sympow_jax.sharding.agreement import gather
from sympow_jax.training.digests import digest_arrays
from sympow_jax.training.manifest import (
    CheckpointError,
    CheckpointMismatchError,
    check_fits,
    fill,
    flatten,
    make_manifest,
    read_manifest,
    unflatten,
)
from sympow_jax.training.stored_arrays import check_stored

_TEMPORARY = ".orbax-checkpoint-tmp"
_ORBAX_MARKS = ("/orbax/", _TEMPORARY, "OCDBT")  # its code, its folders, its format
_RETRY_SECONDS = (1.0, 2.0, 4.0)

log = logging.getLogger(__name__)


class NotWritableError(OSError):
    """A folder of checkpoints that cannot be written, which all processes know."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: `tree` has the structure, dtypes and shardings of the `like` it was asked for."""

    step: int
    tree: dict[str, Any]
    metadata: dict[str, Any]


class Checkpointer:
    """Writes and reads the steps of one directory (on a POSIX file system that all processes share).

    Args:
      directory: holds one folder a step; made if absent.
      keep_last: how many of the newest steps to keep.
      keep_every: keep also every step that is a multiple of this; 0 for none.
      keep_best: keep also the step with the smallest `best_metric`.
      best_metric: key of the `metrics` given to `save`.
      asynchronous: return from `save` once the arrays are copied, and write in the background.
      read_only: never write, delete or rename anything (for evaluation next to a running trainer).
      max_failures: failed saves in a row after which `save` raises instead of warning.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: bool = True,
        best_metric: str = "heldout_loss",
        asynchronous: bool = True,
        read_only: bool = False,
        max_failures: int = 3,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would delete every checkpoint; use 1 or more")
        refuse_link(directory)
        self.directory = pathlib.Path(directory).resolve()
        self.save_stall_seconds = 0.0  # how long the last `save` held the caller
        self.restore_seconds = 0.0  # how long the last `restore` took, verification included
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._best_metric, self._max_failures, self._read_only = best_metric, max_failures, read_only
        self._asynchronous = asynchronous
        self._pending: int | None = None
        self._failures = 0
        self.failed_steps: list[int] = []  # whose saves, asked for and begun, are not on disk
        self._scores: dict[int, float] = {}
        items = {"state": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
        _quieten_orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_temporary()

    # -- what is there

    def steps(self) -> list[int]:
        """Steps on disk, oldest first; whether they are sound is known when they are restored."""
        return list_steps(self.directory)

    def best_step(self) -> int | None:
        """The step with the smallest finite `best_metric`, the newest of equals; None when none has one."""
        scores = {step: self._score(step) for step in self.steps()}
        finite = [step for step, score in scores.items() if math.isfinite(score)]
        return min(finite, key=lambda step: (scores[step], -step), default=None)

    def describe(self, step: int) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
        """Arrays of a step, by name ("params/embedding/table"), and its metadata; reads no array."""
        try:
            manifest = read_manifest(self.directory / str(step))
            specs = {
                name: jax.ShapeDtypeStruct(tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]))
                for name, entry in manifest["arrays"].items()
            }
        except Exception as error:
            raise CheckpointError(f"checkpoint step {step} in {self.directory}: {_one_line(error)}") from error
        return specs, manifest["metadata"]

    # -- writing

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts a save of `tree` and returns True, or False when the step is on disk already.

        `tree` is a nested dict with string keys and arrays; `metadata` is JSON. A save that fails leaves older steps
        untouched and is reported when it is known: at the next `save` or `wait`, as a warning, or as a
        CheckpointError after `max_failures` in a row, or at once where one of several processes failed alone. With
        `force` (the last save of a run) the step is on disk when this returns, after up to three retries; otherwise it
        raises CheckpointError.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened with read_only=True; open it for writing to save")
        started = time.perf_counter()
        self._settle(raises=not force)
        if step in self.steps():
            return False
        self._prune()
        arrays = flatten(tree)
        manifest = make_manifest(step, arrays, metadata, metrics)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(unflatten(arrays)), manifest=ocp.args.JsonSave(manifest))
        if force:
            self._save_now(step, args)
        else:
            self._start(step, args)
            if not self._asynchronous:
                self._settle()
        self.save_stall_seconds = time.perf_counter() - started
        return True

    def wait(self) -> None:
        """Returns once the save under way, if any, is on disk or has failed (see `save`)."""
        self._settle()

    def close(self) -> None:
        """Waits, deletes the steps that need not be kept and ends the background threads."""
        self._close(prune=not self._read_only)

    def _close(self, *, prune: bool) -> None:
        self._settle()
        if prune:
            self._prune()
        self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._close(prune=error is None and not self._read_only)  # what is left after an error may all be needed

    def _start(self, step: int, args: ocp.args.Composite) -> None:
        self._pending = step
        try:
            self._check_writable(step)
            self._orbax.save(self.directory / str(step), args=args)
        except Exception as error:
            self._note_failure(error)

    def _check_writable(self, step: int) -> None:
        """Raises NotWritableError where Orbax would fail, with threads that hold up the end of the process for 300 s.

        All processes raise what one of them meets: none begins a save, or goes on, without the others.
        """
        problem = ""
        try:
            probe = self.directory / f"{step}.probe.{jax.process_index()}{_TEMPORARY}"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            problem = str(error)
        problems = {index: text for index, text in enumerate(gather("writable", problem)) if text}
        if problems:
            index, text = next(iter(problems.items()))
            raise NotWritableError(f"process {index}: {text}" if jax.process_count() > 1 else text)

    def _settle(self, *, raises: bool = True) -> None:
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            self._note_failure(error, raises=raises)
        if self._pending is not None:
            self._pending, self._failures = None, 0

    def _note_failure(self, error: Exception, *, raises: bool = True) -> None:
        step, self._pending = self._pending, None
        self._failures += 1
        if step is not None:
            self.failed_steps.append(step)
        message = self._failure(step, error)
        if _leaves_others_waiting(error):
            raise CheckpointError(f"{message}; free space or fix the folder and start again") from error
        if raises and self._failures >= self._max_failures:
            raise CheckpointError(
                f"{message}; {self._failures} saves failed in a row; free space or fix the folder"
            ) from error
        log.error("%s; training continues", message)

    def _failure(self, step: int | None, error: Exception) -> str:
        with contextlib.suppress(OSError):
            self._remove_temporary()
        try:
            kept = f"newest checkpoint on disk: {max(self.steps(), default='none')}"
        except OSError as unreadable:
            kept = f"the folder cannot be listed ({_one_line(unreadable)})"
        return f"saving step {step} in {self.directory} failed ({_one_line(error)}); {kept}"

    def _save_now(self, step: int, args: ocp.args.Composite) -> None:
        for delay in (*_RETRY_SECONDS, None):
            try:
                self._check_writable(step)
                self._orbax.save(self.directory / str(step), args=args)
                self._orbax.wait_until_finished()
                self._failures = 0
                return
            except Exception as error:
                message = self._failure(step, error)
                if delay is None or _leaves_others_waiting(error):
                    raise CheckpointError(f"{message}; free space or fix the folder and start again") from error
                log.error("%s; trying again in %.0f s", message, delay)
                time.sleep(delay)

    # -- reading

    def restore(self, step: int | str = "latest", *, like: Mapping[str, Any], strict: bool = False) -> Restored:
        """Reads and verifies a step: "latest", "best" or a number.

        `like` is the wanted tree of arrays or ShapeDtypeStructs; a struct's sharding says where the array goes
        (None: the first device). Top-level keys that `like` leaves out are not read; within a key, the names,
        shapes and dtypes must be those saved, else CheckpointMismatchError names the array.
        A damaged step is reported and the newest good one (for "best": the next best) is read instead; with
        `strict`, or when a number was asked for, it is a CheckpointError, as when no step is sound.
        """
        started = time.perf_counter()
        self._settle()
        tried: dict[int, str] = {}
        for candidate in self._candidates(step):
            try:
                restored = self._restore_verified(candidate, like)
            except (CheckpointMismatchError, MemoryError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                tried[candidate] = _one_line(error)
                log.error("checkpoint step %d in %s is damaged: %s", candidate, self.directory, tried[candidate])
                if strict:
                    break
                continue
            self._set_aside([bad for bad in tried if bad > candidate])
            self.restore_seconds = time.perf_counter() - started
            return restored
        reasons = "".join(f"\n  step {bad}: {why}" for bad, why in tried.items())
        raise CheckpointError(
            f"no sound checkpoint in {self.directory}; tried {len(tried)} of {self.steps()}:{reasons}"
        )

    def _candidates(self, step: int | str) -> list[int]:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first, or check --workdir")
        if step == "latest":
            return steps[::-1]
        if step == "best":
            scores = {step: self._score(step) for step in steps}
            return sorted(steps, key=lambda s: (scores[s] if math.isfinite(scores[s]) else math.inf, -s))
        if step not in steps:
            raise CheckpointError(f"step={step} is not in {self.directory}; choose latest, best or one of {steps}")
        return [int(step)]

    def _restore_verified(self, step: int, like: Mapping[str, Any]) -> Restored:
        wanted = flatten(like)
        error = None
        try:
            manifest = read_manifest(self.directory / str(step))
            saved = {name: e for name, e in manifest["arrays"].items() if name.split("/")[0] in like}
            check_fits(step, saved, wanted)
            check_stored(self.directory / str(step), wanted)
            arrays = self._read_arrays(step, wanted)
            digests = digest_arrays(arrays)
            bad = [name for name in saved if digests[name] != saved[name]["digest"]]
            if bad:
                raise ValueError(f"{len(bad)} of {len(saved)} arrays differ from what was saved, first {bad[0]}")
        except Exception as caught:
            error = caught
        if jax.process_count() > 1:
            sound = multihost_utils.process_allgather(np.array(error is None))
            if error is None and not np.all(sound):
                error = ValueError("another process could not read it")
        if error is not None:
            raise error
        return Restored(step, fill(like, arrays), manifest["metadata"])

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        structs, args = {}, {}
        for name, leaf in wanted.items():
            sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            structs[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            args[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        request = ocp.args.PyTreeRestore(item=unflatten(structs), restore_args=unflatten(args), partial_restore=True)
        state = self._orbax.restore(self.directory / str(step), args=ocp.args.Composite(state=request))["state"]
        return flatten(state)

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                metrics = read_manifest(self.directory / str(step))["metrics"]
            except Exception:  # damaged; restore says so when the step is asked for
                return math.nan
            value = metrics.get(self._best_metric)
            self._scores[step] = math.nan if value is None else float(value)
        return self._scores[step]

    # -- keeping and deleting

    def _prune(self) -> None:
        steps = self.steps()
        keep: set[int | None] = set(steps[-self._keep_last :])
        if self._keep_every:
            keep |= {step for step in steps if step % self._keep_every == 0}
        if self._keep_best:
            keep.add(self.best_step())
        if jax.process_index() == 0:
            for step in sorted(set(steps) - keep):
                self._delete(self.directory / str(step))

    def _delete(self, path: pathlib.Path) -> None:
        doomed = path.with_name(f"{path.name}.deleted{_TEMPORARY}")  # removed at the next start if this one is killed
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", path, _one_line(error))

    def _set_aside(self, steps: list[int]) -> None:
        if self._read_only or not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                path = self.directory / str(step)
                aside = path.with_name(f"{step}.damaged")
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)
                log.error("checkpoint step %d was set aside as %s; delete it when it has served", step, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")

    def _remove_temporary(self) -> None:
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _leaves_others_waiting(error: Exception) -> bool:
    """Whether the save failed in this process alone, so that it cannot go on; the others would wait for its part."""
    return jax.process_count() > 1 and not isinstance(error, NotWritableError)


def list_steps(directory: pathlib.Path) -> list[int]:
    """Steps in a folder of checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and path.is_dir())


def _not_from_orbax(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    texts = [record.getMessage(), record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return not any(mark in text for mark in _ORBAX_MARKS for text in texts)


def _quieten_orbax() -> None:
    """Hides the dozen tracebacks about one failure of Orbax, which `save` and `restore` report in a line.

    Orbax logs some; others come from asyncio, which reports each write of an abandoned save when it is collected, and
    from Python, about writes that were never started: a warning, or what kept it from warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)  # adding it again changes nothing
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    previous = sys.unraisablehook
    if getattr(previous, "drops_late_news", False):
        return

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        text = str(unraisable.exc_value)
        loop = text == "Event loop is closed" or "'_ssock'" in text  # the latter where files ran out as it was made
        if not loop and "/orbax/" not in getattr(code, "co_filename", ""):
            previous(unraisable)

    hook.drops_late_news = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook


def _one_line(error: BaseException) -> str:
    """Type and message; of a long one the beginning, which says what was tried, and the end, which says why not."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-240:]}"
