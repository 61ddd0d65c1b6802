"""The token store: documents x length of unsigned tokens in zarr v2, read by rectangles.

The layout is LongCrawl64's (Buckman, "LongCrawl64: A Long-Context Natural-Language Dataset", 2024): one array
`[num_documents, document_length]`, chunked, with the tokenizer, `bos_id`, `vocab_size` and the source clusters in
its attributes. `manifest.json` beside the chunks, where there is one, holds their sha256.
"""

import abc
import functools
import hashlib
import logging

import numpy as np

from sympow_jax.input_pipeline.chunked_array import DEFAULT_CACHE_BYTES, ChunkedArray, StoreError, stored_tokenizer
from sympow_jax.input_pipeline.tokenizers import Tokenizer

MISSING_CHUNKS = ("refuse", "exclude")
_log = logging.getLogger(__name__)


class Store(abc.ABC):
    """Rows of tokens of one length: what sampler, batches and evaluations read.

    address: where it is. digest: what identifies its content. clusters: [num_documents] int64, the source document
    of each row. chunks: (rows, columns) best read together.
    """

    address: str
    digest: str
    vocab_size: int
    bos_id: int
    chunks: tuple[int, int]
    num_documents: int
    document_length: int
    clusters: np.ndarray
    tokenizer: Tokenizer
    segmented: bool = False  # batches have segment_ids, positions and loss_mask

    def check_cache(self, num_rows: int, seq_len: int) -> None:
        """Raise ValueError if the chunks under one rectangle would not fit the cache together."""
        return

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Tokens [rows.stop - rows.start, columns.stop - columns.start], uint16 or uint32, inside the store."""
        for name, bounds, size in (("rows", rows, self.num_documents), ("columns", columns, self.document_length)):
            if bounds.step not in (None, 1) or not 0 <= bounds.start < bounds.stop <= size:
                raise IndexError(
                    f"{name} = {bounds}: {self.address!r} has {size} {name}; give 0 <= start < stop <= {size}"
                )
        return self._read(rows, columns)

    def examples(self, rows: slice, columns: slice) -> dict[str, np.ndarray]:
        """The rectangle as batches have it: targets are the tokens, inputs these after BOS, [rows, columns] int32."""
        tokens = self.read(rows, columns)
        return {"inputs": shift_right(tokens, self.bos_id), "targets": tokens.astype(np.int32)}

    def documents(self, row: int) -> list[int]:
        """The source documents of a row."""
        return [int(self.clusters[row])]

    @abc.abstractmethod
    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        """Tokens of a rectangle that lies inside the store."""


def shift_right(targets: np.ndarray, bos_id: int) -> np.ndarray:
    """inputs[:, 0] = BOS, inputs[:, t] = targets[:, t - 1], int32, also where a window begins inside a document."""
    inputs = np.empty(targets.shape, np.int32)
    inputs[:, 0] = bos_id
    inputs[:, 1:] = targets[:, :-1]
    return inputs


class TokenStore(Store):
    """Rows of one length. Rows of absent row-chunks are left out when `missing_chunks` is "exclude"."""

    def __init__(self, array: ChunkedArray, row_chunks: np.ndarray) -> None:
        self.array = array
        self.address = array.address
        self.vocab_size = array.vocab_size
        self.bos_id = int(array.metadata.attributes["bos_id"])
        self.manifest = array.manifest
        self.chunks = (int(array.metadata.chunks[0]), int(array.metadata.chunks[1]))
        self._row_chunks = row_chunks  # [present row-chunks], ascending: only the last one may be ragged
        height = self.chunks[0]
        absent_tail = len(row_chunks) == 0 or row_chunks[-1] != array.metadata.grid[0] - 1
        ragged = 0 if absent_tail else array.metadata.grid[0] * height - array.metadata.shape[0]
        self.num_documents = len(row_chunks) * height - ragged
        self.document_length = int(array.metadata.shape[1])

    @functools.cached_property
    def digest(self) -> str:
        """What identifies the content, see ChunkedArray.digest, and which rows of it are here where some are not."""
        if len(self._row_chunks) == self.array.metadata.grid[0]:
            return self.array.digest
        return f"{self.array.digest}/rows:{hashlib.sha256(self._row_chunks.astype('<i8').tobytes()).hexdigest()}"

    def check_cache(self, num_rows: int, seq_len: int) -> None:
        """Raise ValueError unless the chunks under one rectangle fit the cache together."""
        num_chunks = -(-num_rows // self.chunks[0]) * -(-seq_len // self.chunks[1])
        needed = num_chunks * self.chunks[0] * self.chunks[1] * self.array.metadata.dtype.itemsize
        if needed > self.array.cache_bytes:
            raise ValueError(
                f"data.cache_bytes = {self.array.cache_bytes}: {num_rows} x {seq_len} tokens lie in {num_chunks} "
                f"chunks of {self.address!r}, which would be decoded again for every batch; use at least {needed}"
            )

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """[num_documents] int64: the source document of each row; by default each row is its own."""
        physical = self.physical_rows(np.arange(self.num_documents))
        recorded = self.array.metadata.clusters()
        return physical if recorded is None else recorded[physical]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept with the store, else the one that its attributes name."""
        return stored_tokenizer(self.array)

    def physical_rows(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers in the array, absent row-chunks included."""
        rows = np.asarray(rows, np.int64)
        return self._row_chunks[rows // self.chunks[0]] * self.chunks[0] + rows % self.chunks[0]

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        pieces = []
        row = rows.start
        while row < rows.stop:
            first = row // self.chunks[0]
            last = first
            while (last + 1) * self.chunks[0] < rows.stop and self._row_chunks[last + 1] == self._row_chunks[last] + 1:
                last += 1
            stop = min(rows.stop, (last + 1) * self.chunks[0])
            start = int(self._row_chunks[first]) * self.chunks[0] + row % self.chunks[0]
            pieces.append(self.array.read(slice(start, start + stop - row), columns))
            row = stop
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_store(address: str, *, missing_chunks: str = "refuse", cache_bytes: int = DEFAULT_CACHE_BYTES) -> TokenStore:
    """Open the store at a local path or a gs://, s3://, http(s):// address.

    Chunks are listed first: absent ones are refused by name, or their row-chunks left out and counted in the log.
    `cache_bytes` bounds the decoded chunks kept, least recently used out first, over all stores opened with it.
    """
    if missing_chunks not in MISSING_CHUNKS:
        raise ValueError(f"data.missing_chunks = {missing_chunks!r}: legal are {', '.join(MISSING_CHUNKS)}")
    array = ChunkedArray(str(address), cache_bytes=cache_bytes)
    if len(array.metadata.shape) != 2:
        raise StoreError(f"store = {address!r}: shape {list(array.metadata.shape)}, but documents x length is needed")
    missing = array.missing()
    if missing.any() and missing_chunks == "refuse":
        names = [array.metadata.key(*index) for index in np.argwhere(missing).tolist()]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise StoreError(
            f"store = {address!r}: {len(names)} of {missing.size} chunks are missing ({shown}); "
            "fetch them, or set data.missing_chunks=exclude to leave out their rows"
        )
    present = np.flatnonzero(~missing.any(axis=1))
    store = TokenStore(array, present)
    if missing.any():
        _log.warning(
            "store %s: %d of %d chunks are missing: %d of %d documents are left out",
            *(address, missing.sum(), missing.size),
            *(array.metadata.shape[0] - store.num_documents, array.metadata.shape[0]),
        )
    if store.num_documents == 0:
        raise StoreError(f"store = {address!r}: no complete row of chunks is present")
    return store
