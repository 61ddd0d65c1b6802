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
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from sympow_jax.files import json_sha256, refuse_link
from sympow_jax.sharding.agreement import from_first, gather
from sympow_jax.training.manifest import (
    CheckpointError,
    CheckpointMismatchError,
    add_to_manifest,
    flatten,
    make_manifest,
    one_line,
    read_manifest,
    unflatten,
)
from sympow_jax.training.quiet_orbax import TEMPORARY, quieten_orbax
from sympow_jax.training.step_folders import StepFolders
from sympow_jax.training.verified_read import Restored, read_verified

_CHUNK_BYTES = 8 * 2**20  # of an array on disk: who reads a part of it need not hold the whole
_RETRY_SECONDS = (1.0, 2.0, 4.0)
_LEAST_FILE, _MOST_FILES = 2**24, 100  # bytes; Orbax keeps the files that it is writing, compressed, in memory

log = logging.getLogger(__name__)


class NotWritableError(OSError):
    """A folder of checkpoints that cannot be written, which all processes know."""


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
        refuse_link(directory)
        self.directory = pathlib.Path(directory).resolve()
        self._folders = StepFolders(
            self.directory, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best, best_metric=best_metric
        )
        self.save_stall_seconds = 0.0  # how long the last `save` held the caller
        self.restore_seconds = 0.0  # how long the last `restore` took, verification included
        self._max_failures, self._read_only, self._asynchronous = max_failures, read_only, asynchronous
        self._pending: int | None = None
        self._failures = 0
        self.failed_steps: list[int] = []  # whose saves, asked for and begun, are not on disk
        items = {"state": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
        quieten_orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._folders.remove_temporary()

    # -- what is there

    def steps(self) -> list[int]:
        """Steps on disk, oldest first; whether they are sound is known when they are restored."""
        return self._folders.steps()

    def best_step(self) -> int | None:
        """The step with the smallest finite `best_metric`, the newest of equals; None when none has one."""
        return self._folders.best_step()

    def describe(self, step: int) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
        """Arrays of a step, by name ("params/embedding/table"), and its metadata; reads no array."""
        try:
            manifest = read_manifest(self._folders.path(step))
            specs = {
                name: jax.ShapeDtypeStruct(tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]))
                for name, entry in manifest["arrays"].items()
            }
        except Exception as error:
            raise CheckpointError(f"checkpoint step {step} in {self.directory}: {one_line(error)}") from error
        return specs, manifest["metadata"]

    def digest(self, step: int) -> str:
        """Of what the manifest of a step says of its arrays, their own digests included."""
        try:
            return json_sha256(read_manifest(self._folders.path(step))["arrays"])
        except Exception as error:
            raise CheckpointError(f"checkpoint step {step} in {self.directory}: {one_line(error)}") from error

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
        if from_first("saved", lambda: step in self.steps()):
            return False
        self._folders.prune()
        arrays = flatten(tree)
        manifest = make_manifest(step, arrays, metadata, metrics)
        size = max(_LEAST_FILE, sum(array.nbytes for array in arrays.values()) // _MOST_FILES)
        chunks = unflatten({name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays})
        state = ocp.args.PyTreeSave(unflatten(arrays), save_args=chunks, ocdbt_target_data_file_size=size)
        args = ocp.args.Composite(state=state, manifest=ocp.args.JsonSave(manifest))
        if force:
            self._save_now(step, args)
        else:
            self._start(step, args)
            if not self._asynchronous:
                self._settle()
        self.save_stall_seconds = time.perf_counter() - started
        return True

    def add(self, step: int, *, metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Adds what was measured of a step after it was saved; the first process writes."""
        if jax.process_index() == 0:
            add_to_manifest(self._folders.path(step), metadata, metrics)

    def wait(self) -> None:
        """Returns once the save under way, if any, is on disk or has failed (see `save`)."""
        self._settle()

    def close(self) -> None:
        """Waits, deletes the steps that need not be kept and ends the background threads."""
        self._close(prune=not self._read_only)

    def _close(self, *, prune: bool) -> None:
        self._settle()
        if prune:
            self._folders.prune()
        self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._close(prune=error is None and not self._read_only)  # what is left after an error may all be needed

    def _start(self, step: int, args: ocp.args.Composite) -> None:
        self._pending = step
        try:
            self._check_writable(step)
            self._orbax.save(self._folders.path(step), args=args)
        except Exception as error:
            self._note_failure(error)

    def _check_writable(self, step: int) -> None:
        """Raises NotWritableError where Orbax would fail, with threads that hold up the end of the process for 300 s.

        All processes raise what one of them meets: none begins a save, or goes on, without the others.
        """
        problem = ""
        try:
            probe = self.directory / f"{step}.probe.{jax.process_index()}{TEMPORARY}"
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
            self._folders.remove_temporary()
        try:
            kept = f"newest checkpoint on disk: {max(self.steps(), default='none')}"
        except OSError as unreadable:
            kept = f"the folder cannot be listed ({one_line(unreadable)})"
        return f"saving step {step} in {self.directory} failed ({one_line(error)}); {kept}"

    def _save_now(self, step: int, args: ocp.args.Composite) -> None:
        for delay in (*_RETRY_SECONDS, None):
            try:
                self._check_writable(step)
                self._orbax.save(self._folders.path(step), args=args)
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
        All processes of a run call it, and read what the first one chooses. A damaged step is reported and the newest
        good one (for "best": the next best) is read instead; with `strict`, or when a number was asked for, it is a
        CheckpointError, as when no step is sound.
        """
        started = time.perf_counter()
        self._settle()
        tried: dict[int, str] = {}
        for candidate in self._folders.candidates(step):
            try:
                restored = read_verified(self._orbax, self._folders.path(candidate), candidate, like)
            except (CheckpointMismatchError, MemoryError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                tried[candidate] = one_line(error)
                log.error("checkpoint step %d in %s is damaged: %s", candidate, self.directory, tried[candidate])
                if strict:
                    break
                continue
            newer = [bad for bad in tried if bad > candidate]
            if newer and not self._read_only:
                self._folders.set_aside(newer)
            self.restore_seconds = time.perf_counter() - started
            return restored
        reasons = "".join(f"\n  step {bad}: {why}" for bad, why in tried.items())
        raise CheckpointError(
            f"no sound checkpoint in {self.directory}; tried {len(tried)} of {self.steps()}:{reasons}"
        )


def _leaves_others_waiting(error: Exception) -> bool:
    """Whether the save failed in this process alone, so that it cannot go on; the others would wait for its part."""
    return jax.process_count() > 1 and not isinstance(error, NotWritableError)
