"""The data of a run: batches to train on, batches for held-out loss, and the tokeniser."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from sympow_jax.config import Config
from sympow_jax.input_pipeline.batches import Batch, StoreBatches
from sympow_jax.input_pipeline.opening import open_batches
from sympow_jax.input_pipeline.prefetch import Prefetch, prefetch
from sympow_jax.input_pipeline.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunData:
    """Opened stores; batches are pure functions of their number."""

    config: Config
    train: StoreBatches
    heldout: StoreBatches

    @property
    def vocab_size(self) -> int:
        """Of the training store."""
        return self.train.stores[0].vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the training store."""
        return self.train.stores[0].tokenizer

    def describe(self) -> dict[str, Any]:
        """What data.json records: which content the run saw."""
        return {
            "train_digest": ",".join(store.digest for store in self.train.stores),
            "heldout_digest": ",".join(store.digest for store in self.heldout.stores),
            "tokenizer_digest": self.tokenizer.digest,
            "vocab_size": self.vocab_size,
            "bos_id": self.train.stores[0].bos_id,
        }

    def prefetch(self, start_step: int, stop_step: int) -> Prefetch:
        """(step, batch) of steps start_step .. stop_step - 1, read ahead."""
        d = self.config.data
        return prefetch(
            self.train, start_step, stop_step, prefetch_batches=d.prefetch_batches, num_threads=d.num_threads
        )

    def heldout_batches(self) -> Iterator[Batch]:
        """The fixed batches of held-out loss."""
        for index in range(self.config.evaluation.num_batches):
            yield self.heldout[index]


def open_run_data(config: Config) -> RunData:
    """Opens both stores of a config; a missing default corpus is built first."""
    d = config.data
    options = {
        "seq_len": d.seq_len,
        "batch_size": d.batch_size,
        "missing_chunks": d.missing_chunks,
        "cache_bytes": d.cache_bytes,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "task": config.task,
    }
    return RunData(
        config,
        open_batches(d.train, "train", seed=config.seed, order=d.order, **options),
        open_batches(d.heldout, "heldout", seed=0, **options),
    )
