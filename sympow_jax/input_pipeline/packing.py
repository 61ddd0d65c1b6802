"""Packing: documents of any length in one flat store, concatenated, then split into windows of `seq_len`."""

import functools

import numpy as np

from sympow_jax.input_pipeline import kvstore as kv
from sympow_jax.input_pipeline.chunked_array import DEFAULT_CACHE_BYTES, ChunkedArray, StoreError, stored_tokenizer
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tokenizers import Tokenizer

OFFSETS = "offsets.int64"


def pack(tokens: np.ndarray, offsets: np.ndarray, start: int, *, bos_id: int) -> dict[str, np.ndarray]:
    """One window of the concatenated documents, as a pure function of where it starts.

    tokens [T]: positions start .. start + T - 1 of the stream; offsets [documents + 1]: where each document starts,
    and the end of the stream. A document that the window cuts is a document of its own here: positions restart at 0
    and its first input is BOS. segment_ids count from 1; what lies past the end of the stream is padding: segment 0,
    loss_mask 0. Returns inputs, targets, segment_ids, positions [T] int32 and loss_mask [T] float32.
    """
    places = start + np.arange(len(tokens))
    inside = places < offsets[-1]
    document = np.searchsorted(offsets, places, side="right") - 1
    document = np.where(inside, document, -1)
    first = np.maximum(offsets[np.maximum(document, 0)], start)
    edge = np.diff(document, prepend=-2) != 0
    targets = np.where(inside, tokens, 0)
    inputs = np.where(edge, bos_id, np.roll(targets, 1))
    return {
        "inputs": np.where(inside, inputs, bos_id).astype(np.int32),
        "targets": targets.astype(np.int32),
        "segment_ids": np.where(inside, np.cumsum(edge), 0).astype(np.int32),
        "positions": np.where(inside, places - first, 0).astype(np.int32),
        "loss_mask": inside.astype(np.float32),
    }


class PackedStore(Store):
    """A flat store seen as windows: row w is tokens [w T, (w + 1) T); the last is padded with 0."""

    segmented = True

    def __init__(self, array: ChunkedArray, offsets: np.ndarray, seq_len: int) -> None:
        self.array = array
        self.offsets = offsets
        self.address = array.address
        self.vocab_size = array.vocab_size
        self.bos_id = int(array.metadata.attributes["bos_id"])
        self.manifest = array.manifest
        self.chunks = (max(1, int(array.metadata.chunks[0]) // seq_len), seq_len)
        self.num_tokens = int(array.metadata.shape[0])
        self.num_documents = -(-self.num_tokens // seq_len)
        self.document_length = seq_len

    @functools.cached_property
    def digest(self) -> str:
        """What identifies the content; see ChunkedArray.digest."""
        return self.array.digest

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """[num_documents] int64: the document in which each window begins."""
        starts = np.arange(self.num_documents) * self.document_length
        return np.searchsorted(self.offsets, starts, side="right").astype(np.int64) - 1

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept with the store."""
        return stored_tokenizer(self.array)

    def examples(self, rows: slice, columns: slice) -> dict[str, np.ndarray]:
        """inputs, targets, segment_ids, positions [rows, T] int32 and loss_mask [rows, T] float32; see pack."""
        tokens = self.read(rows, columns)
        starts = range(rows.start * self.document_length, rows.stop * self.document_length, self.document_length)
        packed = [pack(row, self.offsets, s, bos_id=self.bos_id) for row, s in zip(tokens, starts, strict=True)]
        return {name: np.stack([row[name] for row in packed]) for name in packed[0]}

    def documents(self, row: int) -> list[int]:
        """The documents that have tokens in a window."""
        start = row * self.document_length
        stop = min(start + self.document_length, self.num_tokens)
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        return list(range(int(first), int(last) + 1))

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        start, stop = rows.start * self.document_length, rows.stop * self.document_length
        tokens = self.array.read(slice(start, min(stop, self.num_tokens)))
        if stop > self.num_tokens:
            tokens = np.concatenate([tokens, np.zeros(stop - self.num_tokens, tokens.dtype)])
        return tokens.reshape(-1, self.document_length)[:, columns]


def open_packed_store(address: str, *, seq_len: int, cache_bytes: int = DEFAULT_CACHE_BYTES) -> PackedStore:
    """Open the flat store (`[num_tokens]` and `offsets.int64`) that data/prepare.py --documents=packed wrote."""
    array = ChunkedArray(str(address), cache_bytes=cache_bytes)
    if len(array.metadata.shape) != 1:
        raise StoreError(f"store = {address!r}: shape {list(array.metadata.shape)}, but a flat store is needed")
    if seq_len < 1:
        raise ValueError(f"data.seq_len = {seq_len}: must be at least 1")
    missing = array.missing()
    if missing.any():
        names = [array.metadata.key(int(i)) for i in np.flatnonzero(missing)]
        raise StoreError(f"store = {address!r}: {len(names)} chunks are missing ({', '.join(names[:5])}); fetch them")
    return PackedStore(array, read_offsets(array), seq_len)


def read_offsets(array: ChunkedArray) -> np.ndarray:
    """[documents + 1] int64: where each document starts, and the end of the stream."""
    content = kv.read_key(array.kvstore, OFFSETS, max_bytes=8 * (array.metadata.shape[0] + 1))
    if content is None:
        raise StoreError(f"store = {array.address!r}: {OFFSETS} is missing; prepare the store again")
    offsets = np.frombuffer(content[: len(content) // 8 * 8], "<i8")
    total = array.metadata.shape[0]
    if len(content) % 8 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) <= 0).any():
        raise StoreError(
            f"store = {array.address!r}: {OFFSETS} does not rise from 0 to {total}; prepare the store again"
        )
    return offsets
