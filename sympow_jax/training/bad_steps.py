"""Steps that were not applied: which tensor, which rows of the data, and when to give up."""

import math
from typing import Any

import jax

from sympow_jax.config import RunError
from sympow_jax.input_pipeline.batches import BatchSource
from sympow_jax.training.metrics import MetricsWriter
from sympow_jax.typing import PyTree


class BadStepsError(RunError):
    """Too many steps in a row were not applied."""


class BadSteps:
    """Judges the metrics of each step, as fetched from the devices.

    A step that was not applied is printed and gets a row of its own in metrics.jsonl: why, the first tensor that is
    not finite, and where this process's sequences of the batch came from.
    """

    def __init__(self, params: PyTree, source: BatchSource, writer: MetricsWriter, *, max_in_a_row: int):
        paths = jax.tree_util.tree_leaves_with_path(params)
        self._names = ["/".join(str(key.key) for key in path) for path, _ in paths]
        self._source, self._writer, self._limit = source, writer, max_in_a_row
        self.seen = 0  # by this process

    def judge(self, step: int, values: dict[str, Any]) -> None:
        """Reports the step if it was not applied; raises BadStepsError when it is one too many in a row."""
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row == 0:
            return
        self.seen += 1
        row = self._describe(step, values)
        self._writer.write(step, row)
        self._writer.message(f"step {step} was not applied: {row['not_applied']}, documents {row['documents']}")
        if in_a_row > self._limit:
            raise BadStepsError(
                f"optimizer.max_skipped_steps = {self._limit}: {in_a_row} steps in a row up to step {step} were not "
                f"applied ({row['not_applied']}); lower optimizer.learning_rate, or look at the batch with "
                f"python -m sympow_jax.inspect --workdir=WORKDIR --batch={step - 1}"
            )

    def _describe(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        loss, bad, updated = float(values["loss"]), int(values["bad_gradient"]), int(values["bad_parameter"])
        if bad >= 0:
            tensor = f"gradients/{self._names[bad]}"
            reason = f"{tensor} is not finite" + ("" if math.isfinite(loss) else ", and neither is the loss")
        elif not math.isfinite(loss):
            tensor, reason = "loss", "the loss is not finite"
        elif not math.isfinite(values["grad_norm"]):
            tensor, reason = "", "the gradient norm is beyond what float32 holds"
        elif updated >= 0:
            tensor = f"params/{self._names[updated]}"
            reason = f"the update of {tensor} is not finite, though loss and gradient are"
        else:
            tensor, reason = "", f"gradient norm {float(values['grad_norm']):.4g} beyond optimizer.outlier_ratio"
        sequences = self._source.describe(step - 1, text=False)
        return {
            "not_applied": reason,
            "tensor": tensor,
            "rows": [[sequence["store"], sequence["row"], *sequence["columns"]] for sequence in sequences],
            "documents": [document for sequence in sequences for document in sequence["documents"]],
        }
