"""Where the time of a run goes besides its steps: restoring, saving, evaluating, and steps done again after a kill."""

import contextlib
import time
from collections.abc import Iterator


class Goodput:
    """Adds up the seconds of one process's run.

    `row` gives what is new since the last call, for the next row of metrics.jsonl; `summary` is one line for the end.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = {"restore": 0.0, "save": 0.0, "evaluation": 0.0}
        self._worst_save, self._saves = 0.0, 0
        self._row: dict[str, float] = {}

    def restored(self, seconds: float, lost_steps: int) -> str:
        """The run continues from a checkpoint; `lost_steps` were logged after it and are done again. One line."""
        self._seconds["restore"] = seconds
        self._row |= {"restore_seconds": seconds, "lost_steps": lost_steps}
        return f"restored and verified in {seconds:.2f} s; {lost_steps} steps logged since then are done again"

    def saved(self, seconds: float) -> None:
        """A save held the run for so long."""
        self._seconds["save"] += seconds
        self._saves, self._worst_save = self._saves + 1, max(self._worst_save, seconds)
        self._row["save_stall_seconds"] = self._row.get("save_stall_seconds", 0.0) + seconds

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Times an evaluation."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds["evaluation"] += time.perf_counter() - started

    def row(self) -> dict[str, float]:
        """Timings since the last call."""
        row, self._row = self._row, {}
        return row

    def summary(self, steps: int) -> str:
        """For `steps` steps of this process."""
        total = time.perf_counter() - self._started
        s, other = self._seconds, sum(self._seconds.values())
        return (
            f"{steps} steps in {total:.1f} s: {100 * (1 - other / total):.1f}% for steps and start-up; {self._saves} "
            f"saves held it for {s['save']:.2f} s, {self._worst_save:.3f} s at most; restore {s['restore']:.2f} s, "
            f"evaluation {s['evaluation']:.2f} s"
        )
