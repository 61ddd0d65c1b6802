"""The data of a run: batches to train on, batches for held-out loss, and the tokeniser."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import TASKS, Config, ConfigError
from sympow_jax.input_pipeline.batches import Batch, StoreBatches
from sympow_jax.input_pipeline.opening import open_batches
from sympow_jax.input_pipeline.prefetch import Prefetch, prefetch
from sympow_jax.input_pipeline.prepare.corpus import BUILT_IN
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.task_store import make_task
from sympow_jax.input_pipeline.tokenizers import Tokenizer

BYTE_VOCABULARY, GPT2_VOCABULARY = 257, 50_257


@dataclasses.dataclass(frozen=True)
class RunData:
    """Opened stores; batches are pure functions of their number, and hold the rows of this process's devices.

    Attributes:
      config: of the run.
      mesh: where `place` puts batches; None keeps them as they are.
      train, heldout: batches by number, of the rows that this process reads.
    """

    config: Config
    mesh: Mesh | None
    train: "HostBatches"
    heldout: "HostBatches"

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

    def heldout_batches(self) -> Iterator[Mapping[str, jax.Array | np.ndarray]]:
        """The fixed batches of held-out loss, on the devices: evaluation.num_batches of them, or all that there are.

        Each sequence of the stores counts once: where the batches go on after the last one, `loss_mask` leaves out
        what they repeat. All processes see equally many batches, with or without a mask.
        """
        d = self.config.data
        whole = dataclasses.replace(self.heldout.parts[0], process_index=0, process_count=1)
        fresh = [whole.first_pass(index) for index in range(self.config.evaluation.num_batches)]
        wanted = [index for index, rows in enumerate(fresh) if rows.any()]
        masked = not all(fresh[index].all() for index in wanted)
        for index in wanted:
            batch = self.heldout[index]
            if masked:
                mask = np.repeat(self.heldout.first_pass(index)[:, None], d.seq_len, 1).astype(np.float32)
                batch = batch | {"loss_mask": mask * batch.get("loss_mask", 1.0)}
            yield self.place(batch)

    def place(self, batch: Batch) -> Mapping[str, jax.Array | np.ndarray]:
        """The global arrays [B, T] of a batch, of which this process has read the rows that its devices hold."""
        if self.mesh is None:
            return batch
        shape = (self.config.data.batch_size, self.config.data.seq_len)
        blocks, count = sharding.row_blocks(self.mesh)
        rows = shape[0] // count

        def piece(values):
            def shard(index):
                block = (index[0].start or 0) // rows
                first = blocks.index(block) * rows
                return values[first : first + rows, index[1]]

            return shard

        where = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_callback(shape, where, piece(values)) for name, values in batch.items()}


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """The rows of a batch that this process reads: those of each part in turn (usually there is one)."""

    parts: tuple[StoreBatches, ...]

    @property
    def stores(self) -> tuple[Store, ...]:
        """What is read."""
        return self.parts[0].stores

    def __getitem__(self, step: int) -> Batch:
        """This process's rows of global batch `step`."""
        batches = [part[step] for part in self.parts]
        return batches[0] if len(batches) == 1 else {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}

    def describe(self, step: int, *, text: bool = True) -> list[dict[str, Any]]:
        """Where each of them came from."""
        return [row for part in self.parts for row in part.describe(step, text=text)]

    def first_pass(self, step: int) -> np.ndarray:
        """Which of these rows of global batch `step` are no repetition, [rows] bool."""
        return np.concatenate([part.first_pass(step) for part in self.parts])

    def epoch(self, step: int) -> float:
        """Passes over the data finished before `step`."""
        return self.parts[0].epoch(step)


def open_run_data(config: Config, mesh: Mesh | None = None) -> RunData:
    """Opens both stores of a config; a missing default corpus is built first."""
    d = config.data
    blocks, count = ([0], 1) if mesh is None else sharding.row_blocks(mesh)
    size = len(blocks)
    if count % size or blocks[0] % size or blocks[-1] - blocks[0] != size - 1:
        size = 1  # the blocks of this process lie apart in the batch: each is a part
    options = {
        "seq_len": d.seq_len,
        "batch_size": d.batch_size,
        "missing_chunks": d.missing_chunks,
        "cache_bytes": d.cache_bytes,
        "process_index": blocks[0] // size,
        "process_count": count // size,
        "task": config.task,
    }

    def parts(first: StoreBatches) -> HostBatches:
        return HostBatches(tuple(dataclasses.replace(first, process_index=b // size) for b in blocks[::size]))

    train = open_batches(d.train, "train", seed=config.seed, order=d.order, **options)
    if config.training.initial_state != "zero" and train.stores[0].segmented:
        raise ConfigError(
            f"training.initial_state = {config.training.initial_state!r}: the documents of {train.stores[0].address!r} "
            "are packed, and none continues the batch before; use zero, or a store of long documents"
        )
    _check_carried(config, train)
    heldout = open_batches(d.heldout, "heldout", seed=0, **options)
    _check_heldout(config, train, heldout)
    return RunData(config, mesh, parts(train), parts(heldout))


def _check_carried(config: Config, train: StoreBatches) -> None:
    if config.training.initial_state == "carried" and train.stores[0].document_length < 2 * config.data.seq_len:
        raise ConfigError(
            f"training.initial_state = 'carried': the documents of {train.stores[0].address!r} have "
            f"{train.stores[0].document_length} tokens, and none continues a batch of data.seq_len = "
            f"{config.data.seq_len}; use documents of twice that, or zero"
        )


def _check_heldout(config: Config, train: StoreBatches, heldout: StoreBatches) -> None:
    """The losses of ids of another tokenizer would be plausible numbers."""
    ours, theirs = (
        {"vocab_size": store.vocab_size, "bos_id": store.bos_id, "tokenizer": store.tokenizer.digest[:12]}
        for store in (train.stores[0], heldout.stores[0])
    )
    for what, value in theirs.items():
        if value != ours[what]:
            raise ConfigError(
                f"data.heldout = {config.data.heldout!r}: its {what} is {value}, that of data.train = "
                f"{config.data.train!r} is {ours[what]}; hold out data of the same tokenizer"
            )


def abstract_batch(config: Config, mesh: Mesh | None, *, packed: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and, on a mesh, shardings of a batch; `packed` as a store of packed documents gives it."""
    stream = {"tokens_before": "int32"} if config.data.order == "stream" else {}
    names = {"inputs": "int32", "targets": "int32", **stream}
    names |= {"segment_ids": "int32", "positions": "int32", "loss_mask": "float32"} if packed else {}
    shape = (config.data.batch_size, config.data.seq_len)
    where = None if mesh is None else sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in names.items()}


def vocabulary(config: Config) -> int:
    """The vocabulary that a config will have, without opening its data.

    Where only the data would tell it is model.vocab_size, or GPT-2's.
    """
    name = config.data.train
    if name in TASKS:
        return make_task(name, config.data.seq_len, config.task).vocab_size
    return BYTE_VOCABULARY if name in BUILT_IN else config.model.vocab_size or GPT2_VOCABULARY
