"""Batches read ahead by threads, with the time that the consumer had to wait."""

import time
from collections.abc import Iterator

from sympow_jax.input_pipeline.batches import Batch, BatchSource


class Prefetch:
    """Iterator of (step, batch) from `start_step` on; a failed read is raised at the batch that needed it."""

    def __init__(
        self, source: BatchSource, start_step: int, stop_step: int, *, prefetch_batches: int, num_threads: int
    ) -> None:
        import grain  # only where batches are read ahead: evaluation and generation do not

        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
        steps = grain.MapDataset.range(start_step, stop_step).map(lambda step: (int(step), source[int(step)]))
        self._iterator = iter(steps.to_iter_dataset(options))
        self._waited = 0.0
        self._since = time.perf_counter()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        """The next step and its batch."""
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self._waited += time.perf_counter() - start

    def wait_fraction(self) -> float:
        """Share of the time since the last call (or the start) that was spent waiting for batches."""
        now = time.perf_counter()
        fraction = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return min(fraction, 1.0)

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()


def prefetch(
    source: BatchSource, start_step: int, stop_step: int, *, prefetch_batches: int = 4, num_threads: int = 2
) -> Prefetch:
    """Batches start_step .. stop_step - 1 in order, `prefetch_batches` of them read ahead by `num_threads` threads.

    Neither number changes what the batches are. No worker processes, no state: to resume, start at another step.
    """
    if num_threads < 0 or prefetch_batches < 0:
        raise ValueError(f"data.num_threads = {num_threads}, data.prefetch_batches = {prefetch_batches}: must be >= 0")
    return Prefetch(source, start_step, stop_step, prefetch_batches=prefetch_batches, num_threads=num_threads)
