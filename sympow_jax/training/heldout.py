"""What is measured on held-out data during training: the loss, the accuracy of tasks, and the loss by position."""

from collections.abc import Callable

import numpy as np

from sympow_jax.config import TASKS, Config, ConfigError
from sympow_jax.evals.length_generalisation import DOCUMENTS_AT_ONCE, bin_edges, choose_documents, read_documents
from sympow_jax.evals.streaming import Scorer
from sympow_jax.models.model import Model
from sympow_jax.training.data import RunData
from sympow_jax.training.step import make_accuracy_step, make_eval_step
from sympow_jax.typing import PyTree


class Heldout:
    """Measures a model on the run's held-out data; every measurement polls `stopped` and gives up when it is true.

    Raises:
      ConfigError: evaluation.contextwise_length does not fit the held-out documents.
    """

    def __init__(self, config: Config, model: Model, data: RunData, stopped: Callable[[], bool]):
        self._config, self._model, self._data, self._stopped = config, model, data, stopped
        self._loss_step = make_eval_step(model)
        self._accuracy_step = make_accuracy_step(model) if config.data.heldout in TASKS else None
        self._scorer: Scorer | None = None
        if config.evaluation.contextwise_length:
            self._check_documents(config.evaluation.contextwise_length)

    def measure(self, params: PyTree) -> dict[str, float] | None:
        """What is measured; None when stopped.

        heldout_loss, of the held-out sequences in evaluation.num_batches batches or all that there are, each of them
        once; heldout_tokens, the number of targets that it is the mean of; heldout_accuracy of a task; and
        contextwise/<position> if asked for.
        """
        totals = np.zeros(4)  # in float64 over the batches
        for batch in self._data.heldout_batches():
            sums = self._loss_step(params, batch)
            hits = self._accuracy_step(params, batch) if self._accuracy_step else (0.0, 0.0)
            totals += [float(value) for value in (*sums, *hits)]
            if self._stopped():
                return None
        row = {"heldout_loss": totals[0] / totals[1], "heldout_tokens": int(totals[1])}
        if self._accuracy_step:
            row["heldout_accuracy"] = totals[2] / totals[3]
        if not self._config.evaluation.contextwise_length:
            return row
        by_position = self._contextwise(params)
        return None if by_position is None else row | by_position

    def _contextwise(self, params: PyTree) -> dict[str, float] | None:
        """Mean loss of the targets of each octave of positions; the key names the last position of the octave.

        The documents are those that eval.py scores; linear kernels stream them in constant memory.
        """
        e, store = self._config.evaluation, self._data.heldout.stores[0]
        rows = choose_documents(store.num_documents, e.num_documents, seed=0)
        edges = bin_edges(self._config.data.seq_len, e.contextwise_length, bins_per_octave=1)
        if self._scorer is None:  # it compiles once
            options = {"chunk_size": e.chunk_size, "batch_size": DOCUMENTS_AT_ONCE, "num_windows": len(rows)}
            self._scorer = Scorer(self._model, params, bos_id=store.bos_id, **options)
        self._scorer.params, size = params, self._scorer.batch_size
        sums = np.zeros(len(edges) - 1)
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            targets = read_documents(store, some, e.contextwise_length, self._scorer.held(len(some)))
            sums += np.diff(self._scorer.cumulative(targets, edges), axis=1).sum(axis=0)
            if self._stopped():
                return None
        means = sums / (np.diff(edges) * len(rows))
        return {f"contextwise/{edge}": float(mean) for edge, mean in zip(edges[1:].tolist(), means, strict=True)}

    def _check_documents(self, length: int) -> None:
        store, *others = self._data.heldout.stores
        if store.segmented or others:
            what = "mixed" if others else "packed or padded"
            raise ConfigError(
                f"evaluation.contextwise_length = {length}: held-out documents are {what}, and it reads long ones of "
                "one store; use 0, or such a store for data.heldout"
            )
        if length > store.document_length:
            raise ConfigError(
                f"evaluation.contextwise_length = {length}: the held-out documents of {store.address!r} have "
                f"{store.document_length} tokens; use at most that"
            )
