"""Where the time of a run goes: its steps and their rates, waiting for data, restoring, saving and evaluating."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class Waiting(Protocol):
    """What the clock asks of batches that are read ahead."""

    def wait_fraction(self) -> float:
        """Share of the time since the last call that was spent waiting."""
        ...


class Clock:
    """The one clock of a process's run, started when it is made.

    `row` gives the timings of a row of metrics.jsonl, of what came since the last one; `summary` one line for the end.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = {"restore": 0.0, "save": 0.0, "evaluation": 0.0}
        self._saves, self._worst_save = 0, 0.0
        self._once: dict[str, float] = {}  # for the next row only
        self._batches: Waiting | None = None  # until the steps begin
        self._saving = 0.0

    def restored(self, seconds: float, lost_steps: int) -> str:
        """The run continues from a checkpoint; `lost_steps` were logged after it and are done again. One line."""
        self._seconds["restore"] = seconds
        self._once |= {"restore_seconds": seconds, "lost_steps": lost_steps}
        return f"restored and verified in {seconds:.2f} s; {lost_steps} steps logged since then are done again"

    def begin(
        self,
        step: int,
        batches: Waiting,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        num_devices: int,
    ) -> None:
        """The steps begin, after `step`.

        Args:
          step: the step that the run continues from.
          batches: whose waiting time is "data".
          tokens_per_step: over all devices.
          flops_per_token: of training, exact (models/flops.py).
          peak_flops: of one device, what model FLOPs utilisation refers to.
          num_devices: that the step runs on.
        """
        self._batches, self._tokens_per_step, self._num_devices = batches, tokens_per_step, num_devices
        self._utilisation = flops_per_token / peak_flops  # of one device, at one token a second
        self._restart(step)

    def _restart(self, step: int) -> None:
        """The next row tells of what comes after `step` and after now."""
        self._waiting = self._batches.wait_fraction() if self._batches else 0.0
        self._step, self._since, self._saving = step, time.perf_counter(), 0.0

    def saved(self, seconds: float) -> None:
        """A save held the run for so long."""
        self._seconds["save"] += seconds
        self._saves, self._worst_save = self._saves + 1, max(self._worst_save, seconds)
        self._saving += seconds
        self._once["save_stall_seconds"] = self._once.get("save_stall_seconds", 0.0) + seconds

    @contextlib.contextmanager
    def evaluating(self, step: int) -> Iterator[None]:
        """Times the evaluation after `step`; the next row leaves out what came before its end."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds["evaluation"] += time.perf_counter() - started
            self._restart(step)

    def row(self, step: int) -> dict[str, float]:
        """The timings of the row of `step`, which has just ended; fractions are of the time since the last row."""
        seconds, saving = max(time.perf_counter() - self._since, 1e-9), self._saving
        rate = (step - self._step) * self._tokens_per_step / seconds
        saving = min(saving / seconds, 1.0)
        self._restart(step)
        per_device = rate / self._num_devices
        once, self._once = self._once, {}
        return {
            "tokens_per_sec": rate,
            "tokens_per_sec_per_device": per_device,
            "mfu": per_device * self._utilisation,
            "data_wait_fraction": self._waiting,
            "checkpoint_fraction": saving,
            "compute_fraction": max(1.0 - self._waiting - saving, 0.0),
        } | once

    def summary(self, steps: int) -> str:
        """For `steps` steps of this process."""
        total = time.perf_counter() - self._started
        s, other = self._seconds, sum(self._seconds.values())
        return (
            f"{steps} steps in {total:.1f} s: {100 * (1 - other / total):.1f}% for steps and start-up; {self._saves} "
            f"saves held it for {s['save']:.2f} s, {self._worst_save:.3f} s at most; restore {s['restore']:.2f} s, "
            f"evaluation {s['evaluation']:.2f} s"
        )
