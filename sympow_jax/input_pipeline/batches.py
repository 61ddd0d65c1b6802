"""Batches as a pure function of (seed, step, global batch, length): `source[step]`, and what that batch was."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sympow_jax.input_pipeline import sampler
from sympow_jax.input_pipeline.store import Store

Batch = dict[str, np.ndarray]


@runtime_checkable
class BatchSource(Protocol):
    """Batches by step; nothing but the step says where a run stands."""

    def __getitem__(self, step: int) -> Batch:
        """This host's part of global batch `step`."""
        ...

    def describe(self, step: int, *, text: bool = True) -> list[dict[str, Any]]:
        """Where each sequence of this host's part of global batch `step` came from."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the data finished before `step`."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreBatches:
    """Batches from one store or a weighted mixture of stores; made by make_batches.

    `source[step]` holds `inputs` and `targets`, [batch_size / process_count, seq_len] int32: targets are the stored
    tokens, inputs the targets shifted right with BOS in front, also where a window begins inside a document.
    Packed stores and TFDS datasets add `segment_ids`, `positions` (int32) and `loss_mask` (float32). In the order
    "stream" the input before a window is the document's token there, and `tokens_before` (int32) how many precede it.
    """

    stores: tuple[Store, ...]
    mixture: sampler.Mixture
    seq_len: int
    batch_size: int
    order: str
    seed: int
    process_index: int
    process_count: int

    @functools.cached_property
    def grids(self) -> tuple[sampler.Grid, ...]:
        """How each store is cut into sequences."""
        return tuple(
            sampler.Grid(store.num_documents, store.document_length // self.seq_len, self.seq_len, store.chunks)
            for store in self.stores
        )

    def __getitem__(self, step: int) -> Batch:
        """This host's part of global batch `step`."""
        batch: Batch = {}
        local = self.batch_size // self.process_count
        for store, run, slots in self.runs(step):
            part = self._examples(self.stores[store], run)
            if len(slots) == local:
                return part
            for name, values in part.items():
                batch.setdefault(name, np.empty((local, self.seq_len), values.dtype))[slots] = values
        return batch

    def describe(self, step: int, *, text: bool = True) -> list[dict[str, Any]]:
        """For each sequence: store, its row there, columns [start, stop), source documents and, unless False, text."""
        described: list[dict[str, Any]] = [{} for _ in range(self.batch_size // self.process_count)]
        for index, run, slots in self.runs(step):
            store = self.stores[index]
            columns = self._columns(run)
            for row, slot in zip(range(run.start, run.stop), slots.tolist(), strict=True):
                described[slot] = {
                    "store": store.address,
                    "row": row,
                    "columns": [columns.start, columns.stop],
                    "documents": store.documents(row),
                }
                if text:
                    tokens = store.read(slice(row, row + 1), columns)[0]
                    described[slot]["text"] = store.tokenizer.decode(tokens)
        return described

    def epoch(self, step: int) -> float:
        """Passes over the store that is repeated most, finished before `step`."""
        share = self.mixture.counts / self.mixture.counts.sum()
        passes = (step * self.batch_size * s / g.num_sequences for s, g in zip(share, self.grids, strict=True))
        return float(max(passes))

    def first_pass(self, step: int) -> np.ndarray:
        """Which sequences of this host's part of global batch `step` no other one repeats, [rows] bool.

        Those of a store that an earlier one of the mixture equals are all repetitions.
        """
        local = self.batch_size // self.process_count
        start = step * self.batch_size + self.process_index * local
        fresh = np.zeros(local, bool)
        digests = [store.digest for store in self.stores]
        for share in self.mixture.split(start, start + local):
            if digests.index(digests[share.store]) == share.store:
                fresh[share.slots] = np.arange(share.start, share.stop) < self.grids[share.store].num_sequences
        return fresh

    def _examples(self, store: Store, run: sampler.Run) -> Batch:
        rows, columns = slice(run.start, run.stop), self._columns(run)
        part = store.examples(rows, columns)
        if self.order != "stream":
            return part
        if columns.start:
            part["inputs"][:, :1] = store.read(rows, slice(columns.start - 1, columns.start))
        return part | {"tokens_before": np.full(part["inputs"].shape, columns.start, np.int32)}

    def _columns(self, run: sampler.Run) -> slice:
        return slice(run.block * self.seq_len, (run.block + 1) * self.seq_len)

    def runs(self, step: int) -> list[tuple[int, sampler.Run, np.ndarray]]:
        """(store, run, slots in this host's batch) of global batch `step`."""
        local = self.batch_size // self.process_count
        start = step * self.batch_size + self.process_index * local
        found = []
        for share in self.mixture.split(start, start + local):
            grid = self.grids[share.store]
            done = 0
            order = {"order": self.order, "seed": self.seed + share.store, "batch_size": self.batch_size}
            for run in sampler.runs(grid, share.start, share.stop, **order):
                count = run.stop - run.start
                found.append((share.store, run, share.slots[done : done + count]))
                done += count
        return found


def make_batches(
    stores: Store | Sequence[Store],
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    order: str = "rectangle",
    weights: Sequence[float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> StoreBatches:
    """Batches of `batch_size` sequences (over all processes) of `seq_len` tokens from one store or a mixture.

    `order` is "rectangle" (all rows of the first columns, then the next columns: LongCrawl64's) or "shuffled_chunks"
    (chunks in an order drawn from seed and epoch; where there is one chunk, its sequences) or "stream" (each row of a
    batch goes on where that of the batch before ended, document after document; one store, not packed). `weights` are
    the stores' shares of the sequences, by default equal. Packed stores come from
    `open_packed_store(..., seq_len=seq_len)`.
    """
    stores = tuple(stores) if isinstance(stores, Sequence) else (stores,)
    weights = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(stores)
    if order not in sampler.ORDERS:
        raise ValueError(f"data.order = {order!r}: legal are {', '.join(sampler.ORDERS)}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"data.batch_size = {batch_size}: must be a positive multiple of the {process_count} processes"
        )
    if not stores or len(weights) != len(stores) or not all(0 < w < math.inf for w in weights):
        raise ValueError(
            f"data weights = {list(weights)}: one positive weight for each of the {len(stores)} stores is needed"
        )
    for store in stores:
        if order == "stream" and (stores[1:] or store.segmented):
            raise ValueError(
                "data.order = 'stream': reads the documents of one store that is not packed; use rectangle, or name "
                "one store of documents in data.train"
            )
        _check_store(store, stores[0], seq_len)
        store.check_cache(batch_size // process_count, seq_len)
    mixture = sampler.Mixture(weights, seed)
    if mixture.counts.min() < 1:
        raise ValueError(f"data weights = {list(weights)}: each share must be at least 1 / {sampler.MIXTURE_BLOCK}")
    return StoreBatches(stores, mixture, seq_len, batch_size, order, seed, process_index, process_count)


def _check_store(store: Store, first: Store, seq_len: int) -> None:
    if store.segmented and store.document_length != seq_len:
        raise ValueError(
            f"data.seq_len = {seq_len}: {store.address!r} was opened for windows of {store.document_length}"
        )
    if not 1 <= seq_len <= store.document_length:
        raise ValueError(
            f"data.seq_len = {seq_len}: {store.address!r} has documents of {store.document_length} tokens; "
            f"use 1..{store.document_length}, or prepare a store of longer documents"
        )
    if store.segmented != first.segmented:
        raise ValueError(f"data: {first.address!r} and {store.address!r} cannot be mixed: one has segments, one rows")
    for field in ("vocab_size", "bos_id"):
        if getattr(store, field) != getattr(first, field):
            raise ValueError(
                f"data: {field} is {getattr(first, field)} in {first.address!r} and {getattr(store, field)} in "
                f"{store.address!r}; stores of one mixture must share a tokenizer"
            )
    if store.tokenizer.digest != first.tokenizer.digest:
        raise ValueError(f"data: {first.address!r} and {store.address!r} cannot be mixed: their tokenizers differ")
