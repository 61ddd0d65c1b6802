"""The folders of a directory of checkpoints, one a step: which there are, how good they are, and which may go."""

import logging
import math
import pathlib
import shutil

import jax
from jax.experimental import multihost_utils

from sympow_jax.sharding.agreement import from_first
from sympow_jax.training.manifest import CheckpointError, one_line, read_manifest
from sympow_jax.training.quiet_orbax import TEMPORARY

log = logging.getLogger(__name__)


class StepFolders:
    """The steps in `directory`; the other arguments say which `prune` keeps, as for Checkpointer."""

    def __init__(self, directory: pathlib.Path, *, keep_last: int, keep_every: int, keep_best: bool, best_metric: str):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would delete every checkpoint; use 1 or more")
        self.directory = directory
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._best_metric = best_metric
        self._scores: dict[int, float] = {}

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return list_steps(self.directory)

    def path(self, step: int) -> pathlib.Path:
        """The folder of a step."""
        return self.directory / str(step)

    def best_step(self) -> int | None:
        """The step with the smallest finite `best_metric`, the newest of equals; None when none has one."""
        scores = {step: self._score(step) for step in self.steps()}
        finite = [step for step, score in scores.items() if math.isfinite(score)]
        return min(finite, key=lambda step: (scores[step], -step), default=None)

    def candidates(self, step: int | str) -> list[int]:
        """The steps to try for "latest", "best" or a number, the wanted one first; those that the first process finds.

        Another run may write meanwhile. All processes call it.
        """
        return from_first("steps", lambda: self._candidates(step), CheckpointError)

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

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                metrics = read_manifest(self.path(step))["metrics"]
            except Exception:  # damaged; restore says so when the step is asked for
                return math.nan
            value = metrics.get(self._best_metric)
            self._scores[step] = math.nan if value is None else float(value)
        return self._scores[step]

    def prune(self) -> None:
        """Deletes the steps that need not be kept."""
        steps = self.steps()
        keep: set[int | None] = set(steps[-self._keep_last :])
        if self._keep_every:
            keep |= {step for step in steps if step % self._keep_every == 0}
        if self._keep_best:
            keep.add(self.best_step())
        if jax.process_index() == 0:
            for step in sorted(set(steps) - keep):
                self._delete(self.path(step))

    def _delete(self, path: pathlib.Path) -> None:
        doomed = path.with_name(f"{path.name}.deleted{TEMPORARY}")  # removed at the next start if this one is killed
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", path, one_line(error))

    def set_aside(self, steps: list[int]) -> None:
        """Renames steps that are damaged, so that training can save them again."""
        if jax.process_index() == 0:
            for step in steps:
                path = self.path(step)
                aside = path.with_name(f"{step}.damaged")
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)
                log.error("checkpoint step %d was set aside as %s; delete it when it has served", step, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")

    def remove_temporary(self) -> None:
        """Removes what a save or deletion left that did not finish."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{TEMPORARY}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def list_steps(directory: pathlib.Path) -> list[int]:
    """Steps in a folder of checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _names_step(path.name) and path.is_dir())


def _names_step(name: str) -> bool:
    """Whether a step has a folder of this name: no zeros in front, and no digits of other scripts."""
    return name.isdecimal() and name == str(int(name))
