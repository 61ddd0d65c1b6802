"""Other things that read like a store of rows: files of tokens, and heldout joined into longer streams."""

import functools

import numpy as np

from sympow_jax.input_pipeline.address import split_address
from sympow_jax.input_pipeline.metadata import GPT2_ATTRIBUTES
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.token_files import OPTIONS, check_samples, open_token_file
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer, token_dtype

BIN_ROW_LENGTH = 65536  # LongCrawl64's documents, which its .bin files hold end to end


class BinStore(Store):
    """A file of tokens end to end (see token_files) as rows of 65,536, or one row if it is shorter.

    `address` is FILE or FILE?dtype=NAME&tokenizer=NAME. Without a tokenizer there it is the one in tokenizer/ beside
    the file; without that, GPT-2's, where the format means it.
    """

    def __init__(self, address: str) -> None:
        path, options = split_address(address, OPTIONS)
        self._file = open_token_file(path, dtype=options["dtype"])
        named = load_tokenizer(options["tokenizer"]) if options["tokenizer"] else self._file.tokenizer()
        self._named = named
        self.vocab_size = int(GPT2_ATTRIBUTES["vocab_size"]) if named is None else named.vocab_size
        self.bos_id = int(GPT2_ATTRIBUTES["bos_id"]) if named is None else named.bos_id
        check_samples(self._file, self.vocab_size)
        tokens = self._file.tokens
        length = min(BIN_ROW_LENGTH, len(tokens))
        self.address = address
        self.chunks = (1, length)
        self.num_documents = len(tokens) // length  # an incomplete last row is left out
        self.document_length = length
        self._rows = tokens[: self.num_documents * length].reshape(-1, length)

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the file, and the number type where that is not in it."""
        return f"sha256:{self._file.digest}"

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """Each row is its own."""
        return np.arange(self.num_documents)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one named or found; by default GPT-2's, without LongCrawl64's escapes."""
        return self._named or load_tokenizer("gpt2")

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        tokens = np.array(self._rows[rows, columns])
        for row, place in zip(tokens, range(rows.start, rows.stop), strict=True):
            self._file.check(row, self.vocab_size, place * self.document_length + columns.start)
        return tokens.astype(token_dtype(self.vocab_size), copy=False)


class ConcatView(Store):
    """`store` as rows of `length` tokens, longer than any document.

    Rows of one source document come next to each other and in order. The cluster of a joined row is the source that
    most of its tokens are from.
    """

    def __init__(self, store: Store, length: int) -> None:
        total = store.num_documents * store.document_length
        if not 1 <= length <= total:
            raise ValueError(f"concat length = {length}: {store.address!r} holds {total} tokens in all; use 1..{total}")
        self.store = store
        self.address = store.address
        self.digest = f"{store.digest}/joined{length}"
        self.vocab_size = store.vocab_size
        self.bos_id = store.bos_id
        self.chunks = (1, min(length, store.chunks[1]))
        self.num_documents = total // length
        self.document_length = length
        self._order = np.argsort(store.clusters, kind="stable")
        self.clusters = np.array([self._source(row) for row in range(self.num_documents)])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the store."""
        return self.store.tokenizer

    def _source(self, row: int) -> int:
        start, stop, size = row * self.document_length, (row + 1) * self.document_length, self.store.document_length
        places = np.arange(start // size, -(-stop // size))
        counts = np.minimum(stop, (places + 1) * size) - np.maximum(start, places * size)
        sources, which = np.unique(self.store.clusters[self._order[places]], return_inverse=True)
        return int(sources[np.argmax(np.bincount(which, counts))])

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
