"""Other things that read like a store of rows: nanoGPT `.bin` files, and heldout joined into longer streams."""

import functools
import pathlib

import numpy as np

from sympow_jax.files import file_sha256
from sympow_jax.input_pipeline.chunked_array import TOKENIZER_FOLDER
from sympow_jax.input_pipeline.metadata import GPT2_ATTRIBUTES, StoreError
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer

BIN_ROW_LENGTH = 65536  # LongCrawl64's documents, which its .bin files hold end to end


class BinStore(Store):
    """A nanoGPT `.bin` (flat little-endian uint16 GPT-2 tokens) as rows of 65,536, or one row if it is shorter."""

    vocab_size = int(GPT2_ATTRIBUTES["vocab_size"])
    bos_id = int(GPT2_ATTRIBUTES["bos_id"])

    def __init__(self, address: str) -> None:
        path = pathlib.Path(address)
        if not path.is_file() or path.stat().st_size < 2 or path.stat().st_size % 2:
            raise StoreError(f"store = {address!r}: no file of uint16 tokens (it must exist and have an even size)")
        tokens = np.memmap(path, np.dtype("<u2"), mode="r")
        length = min(BIN_ROW_LENGTH, len(tokens))
        self.address = address
        self.chunks = (1, length)
        self.num_documents = len(tokens) // length  # an incomplete last row is left out
        self.document_length = length
        self._rows = tokens[: self.num_documents * length].reshape(-1, length)

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the file."""
        return f"sha256:{file_sha256(self.address)}"

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """Each row is its own."""
        return np.arange(self.num_documents)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """GPT-2's, without LongCrawl64's escapes; its vocabulary may lie in tokenizer/ beside the file."""
        folder = pathlib.Path(self.address).parent / TOKENIZER_FOLDER
        return load_tokenizer(f"gpt2:{folder}" if folder.is_dir() else "gpt2")

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        tokens = np.array(self._rows[rows, columns])
        if int(tokens.max()) >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0].tolist()
            place = (rows.start + row) * self.document_length + columns.start + column
            raise StoreError(
                f"store = {self.address!r}: token {int(tokens[row, column])} at {place}, "
                f"but vocab_size = {self.vocab_size}; only GPT-2 tokens can be read from a .bin"
            )
        return tokens


class ConcatView(Store):
    """The rows of a store joined into rows of `length`, rows of one source document next to each other and in order."""

    def __init__(self, store: Store, length: int) -> None:
        total = store.num_documents * store.document_length
        if not 1 <= length <= total:
            raise ValueError(f"concat length = {length}: {store.address!r} holds {total} tokens in all; use 1..{total}")
        self.store = store
        self.address = store.address
        self.digest = f"{store.digest}/concat{length}"
        self.vocab_size = store.vocab_size
        self.bos_id = store.bos_id
        self.chunks = (1, min(length, store.chunks[1]))
        self.num_documents = total // length
        self.document_length = length
        self.clusters = np.arange(self.num_documents)
        self._order = np.argsort(store.clusters, kind="stable")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the store."""
        return self.store.tokenizer

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        start = [row * self.document_length + columns.start for row in range(rows.start, rows.stop)]
        return np.stack([self._stream(s, s + columns.stop - columns.start) for s in start])

    def _stream(self, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            place, column = divmod(start, self.store.document_length)
            count = min(stop - start, self.store.document_length - column)
            row = int(self._order[place])
            parts.append(self.store.read(slice(row, row + 1), slice(column, column + count))[0])
            start += count
        return np.concatenate(parts)


def concat_view(store: Store, length: int) -> ConcatView:
    """`store` as rows of `length` tokens, longer than any document; each joined row is a cluster of its own."""
    return ConcatView(store, length)
