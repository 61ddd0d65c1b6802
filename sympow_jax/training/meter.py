"""Where the time between two logged steps went, and what it bought."""

import contextlib
import time
from collections.abc import Iterator

from sympow_jax.input_pipeline.prefetch import Prefetch


class Meter:
    """Rates and the split of time between two logged steps; evaluation and the start of the run are left out.

    Args:
      batches: whose waiting time is "data".
      tokens_per_step: over all devices.
      flops_per_token: of training, exact (models/flops.py).
      peak_flops: of one device, what model FLOPs utilisation refers to.
      num_devices: that the step runs on.
      first_step: the step that the run continues from.
    """

    def __init__(
        self,
        batches: Prefetch,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        num_devices: int,
        first_step: int,
    ):
        self._batches, self._tokens_per_step, self._num_devices = batches, tokens_per_step, num_devices
        self._utilisation = flops_per_token / peak_flops  # of one device, at one token a second
        self._step, self._since, self._saving = first_step, time.perf_counter(), 0.0

    def restart(self, step: int) -> None:
        """Begins to measure after `step`, now: what came since the last logged step is left out."""
        self._batches.wait_fraction()
        self._step, self._since, self._saving = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time inside as checkpoint time."""
        begin = time.perf_counter()
        yield
        self._saving += time.perf_counter() - begin

    def row(self, step: int) -> dict[str, float]:
        """The timings of the metrics row of `step`; fractions are of the time since the last row."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = (step - self._step) * self._tokens_per_step / seconds
        waiting, saving = self._batches.wait_fraction(), min(self._saving / seconds, 1.0)
        self._step, self._since, self._saving = step, time.perf_counter(), 0.0
        per_device = rate / self._num_devices
        return {
            "tokens_per_sec": rate,
            "tokens_per_sec_per_device": per_device,
            "mfu": per_device * self._utilisation,
            "data_wait_fraction": waiting,
            "checkpoint_fraction": saving,
            "compute_fraction": max(1.0 - waiting - saving, 0.0),
        }
