"""What each step gave, told one step late."""

from typing import Any

import jax

from sympow_jax.config import Config
from sympow_jax.training.bad_steps import BadSteps
from sympow_jax.training.clock import Clock
from sympow_jax.training.metrics import MetricsWriter
from sympow_jax.typing import Array

_NOT_LOGGED = ("bad_gradient", "bad_parameter")


class StepReports:
    """Fetches the metrics of a step once the next one is under way, judges them and writes the row of a logged step.

    So the devices never wait for the host, and never have more than two steps to do.
    """

    def __init__(self, config: Config, bad_steps: BadSteps, writer: MetricsWriter, clock: Clock):
        self._every, self._last = config.logging.every_steps, config.num_train_steps
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        self._bad_steps, self._writer, self._clock = bad_steps, writer, clock
        self._pending: tuple[int, dict[str, Array]] | None = None

    def see(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step under way, and reports the one before it."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Reports the last step seen; raises BadStepsError when it is one too many."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values: dict[str, Any] = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if step % self._every == 0 or step == self._last:
            row = {name: value for name, value in values.items() if name not in _NOT_LOGGED}
            self._writer.write(step, row | self._clock.row(step) | {"tokens": step * self._tokens_per_step})
        self._bad_steps.judge(step, values)
