"""The token store: documents x length of unsigned tokens in zarr v2, read by rectangles.

The layout is LongCrawl64's (Buckman, "LongCrawl64: A Long-Context Natural-Language Dataset", 2024): one array
`[num_documents, document_length]`, chunked, with the tokenizer, `bos_id`, `vocab_size` and the source clusters in
its attributes. `manifest.json` beside the chunks, where there is one, holds their sha256.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from sympow_jax.input_pipeline import kvstore as kv
from sympow_jax.input_pipeline.tokenizers import GPT2_HASHES, SPEC_FILE, Tokenizer, load_tokenizer, tokenizer_from_files

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DEFAULT_CACHE_BYTES = 2**30
MISSING_CHUNKS = ("refuse", "exclude")
GPT2_ATTRIBUTES = {"vocab_size": 50257, "bos_id": 50256, "tokenizer": {"kind": "gpt2", "json_escape": True}}
_log = logging.getLogger(__name__)


class StoreError(ValueError):
    """A store that is missing, damaged or not what it claims; the message names the store and the chunk."""


class Store(Protocol):
    """What sampler, batches and evaluations need of a store of rows."""

    address: str
    digest: str
    vocab_size: int
    bos_id: int
    chunks: tuple[int, int]

    @property
    def num_documents(self) -> int:
        """Number of rows."""
        ...

    @property
    def document_length(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def clusters(self) -> np.ndarray:
        """[num_documents] int64: the source document of each row."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        ...

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Tokens [rows, columns], uint16 or uint32."""
        ...


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `.zarray` and `.zattrs` say."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    separator: str
    attributes: dict[str, Any]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks in each dimension, a ragged last one included."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def key(self, *index: int) -> str:
        """File name of a chunk."""
        return self.separator.join(str(i) for i in index)

    def keys(self) -> list[str]:
        """File names of all chunks, in row-major order."""
        return [self.key(*index) for index in np.ndindex(self.grid)]


def read_metadata(address: str, kvstore: ts.KvStore) -> Metadata:
    """Metadata of the zarr v2 array at `address`, checked."""
    try:
        raw = kv.read_key(kvstore, ".zarray")
        attributes = kv.read_key(kvstore, ".zattrs")
    except Exception as error:  # network and permission errors come in many types
        raise StoreError(f"store = {address!r}: cannot be read ({_one_line(error)})") from None
    if raw is None:
        raise StoreError(f"store = {address!r}: no zarr v2 array there (no .zarray); make one with data/prepare.py")
    try:
        zarray = json.loads(raw)
        dtype = np.dtype(zarray["dtype"])
        shape, chunks = tuple(zarray["shape"]), tuple(zarray["chunks"])
        merged = {**GPT2_ATTRIBUTES, **json.loads(attributes or b"{}")}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"store = {address!r}: .zarray or .zattrs is damaged ({_one_line(error)})") from None
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or zarray.get("order", "C") != "C":
        raise StoreError(
            f"store = {address!r}: dtype {zarray['dtype']!r}, order {zarray.get('order')!r}; legal are <u2 and <u4 in C order"
        )
    return Metadata(shape, chunks, dtype, zarray.get("dimension_separator", "."), merged)


def open_array(address: str, *, cache_bytes: int) -> ts.TensorStore:
    """The tensorstore array; an absent chunk is an error when it is read, never zeros."""
    spec = {
        "driver": "zarr",
        "kvstore": kv.kvstore_spec(address),
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }
    try:
        return ts.open(spec, read=True, context=kv.shared_context(cache_bytes)).result()
    except ValueError as error:
        raise StoreError(f"store = {address!r}: cannot be opened ({_one_line(error)})") from None


class ChunkedArray:
    """A zarr array whose chunks are checked at their first use: present, decodable, of the recorded digest, in the vocabulary.

    Digests are compared for local stores; `data/prepare.py verify` does it for any.
    """

    def __init__(self, address: str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.address = str(address)
        self.kvstore = kv.open_kvstore(self.address)
        self.metadata = read_metadata(self.address, self.kvstore)
        self._array = open_array(self.address, cache_bytes=cache_bytes)
        self.vocab_size = int(self.metadata.attributes["vocab_size"])
        manifest = kv.read_key(self.kvstore, MANIFEST)
        self.manifest: dict[str, Any] = json.loads(manifest) if manifest else {}
        self._digests: dict[str, str] = self.manifest.get("chunks", {})
        compare = bool(self._digests) and not kv.is_remote(self.address)
        self._unchecked = np.full(self.metadata.grid, compare)

    @functools.cached_property
    def digest(self) -> str:
        """`sha256:` over metadata and chunk digests, or `listing:` over metadata and chunk names without a manifest."""
        total = hashlib.sha256()
        for name in (".zarray", ".zattrs"):
            total.update((kv.read_key(self.kvstore, name) or b"") + b"\0")
        if self._digests:
            total.update(json.dumps(self._digests, sort_keys=True).encode())
            return f"sha256:{total.hexdigest()}"
        keys = kv.present_keys(self.address, self.kvstore, self.metadata.keys())
        total.update("\n".join(sorted(keys)).encode())
        return f"listing:{total.hexdigest()}"

    def missing(self) -> np.ndarray:
        """Boolean [grid]: True where a chunk is absent, found by listing."""
        keys = self.metadata.keys()
        present = kv.present_keys(self.address, self.kvstore, keys)
        return np.array([key not in present for key in keys]).reshape(self.metadata.grid)

    def read(self, *region: slice) -> np.ndarray:
        """Tokens of `region`, one slice for each dimension."""
        touched = tuple(slice(s.start // c, -(-s.stop // c)) for s, c in zip(region, self.metadata.chunks, strict=True))
        if self._unchecked[touched].any():
            self._compare_digests(touched)
        try:
            tokens = self._array[region].read().result()
        except ValueError:
            self._name_unreadable(touched)
            raise
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            self._name_outlier(tokens, region)
        return tokens

    def _indices(self, touched: tuple[slice, ...]) -> list[tuple[int, ...]]:
        starts = [s.start for s in touched]
        counts = [s.stop - s.start for s in touched]
        return [tuple(a + b for a, b in zip(starts, index, strict=True)) for index in np.ndindex(*counts)]

    def check_digest(self, index: tuple[int, ...]) -> None:
        """Raise StoreError unless the file of chunk `index` has the digest that the manifest records."""
        key = self.metadata.key(*index)
        content = kv.read_key(self.kvstore, key)
        if content is None:
            raise StoreError(f"store = {self.address!r}: chunk {key} is missing; fetch or prepare it again")
        digest = hashlib.sha256(content).hexdigest()
        if digest != self._digests.get(key):
            raise StoreError(
                f"store = {self.address!r}: chunk {key} is damaged: sha256 {digest[:12]}, "
                f"the manifest says {self._digests.get(key, 'nothing')[:12]}; fetch or prepare it again"
            )

    def _compare_digests(self, touched: tuple[slice, ...]) -> None:
        for index in self._indices(touched):
            if self._unchecked[index]:
                self.check_digest(index)
                self._unchecked[index] = False

    def _name_unreadable(self, touched: tuple[slice, ...]) -> None:
        for index in self._indices(touched):
            bounds = zip(index, self.metadata.chunks, self.metadata.shape, strict=True)
            region = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in bounds)
            try:
                self._array[region].read().result()
            except ValueError as error:
                absent = kv.read_key(self.kvstore, self.metadata.key(*index)) is None
                what = "is missing" if absent else f"cannot be decoded ({_one_line(error)})"
                raise StoreError(
                    f"store = {self.address!r}: chunk {self.metadata.key(*index)} {what}; fetch or prepare it again"
                ) from None

    def _name_outlier(self, tokens: np.ndarray, region: tuple[slice, ...]) -> None:
        local = np.unravel_index(int(np.argmax(tokens >= self.vocab_size)), tokens.shape)
        index = tuple(s.start + int(i) for s, i in zip(region, local, strict=True))
        chunk = self.metadata.key(*(i // c for i, c in zip(index, self.metadata.chunks, strict=True)))
        raise StoreError(
            f"store = {self.address!r}: chunk {chunk} holds token {int(tokens[local])} at {list(index)}, "
            f"but vocab_size = {self.vocab_size}; prepare the store again or correct its attributes"
        )


class TokenStore:
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
        self._num_documents = len(row_chunks) * height - ragged

    @property
    def num_documents(self) -> int:
        """Number of rows that can be read."""
        return self._num_documents

    @property
    def document_length(self) -> int:
        """Tokens in a row."""
        return int(self.array.metadata.shape[1])

    @property
    def digest(self) -> str:
        """What identifies the content; see ChunkedArray.digest."""
        return self.array.digest

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """[num_documents] int64: the source document of each row; by default each row is its own."""
        physical = self.physical_rows(np.arange(self.num_documents))
        recorded = self.array.metadata.attributes.get("clusters")
        return physical if recorded is None else np.asarray(recorded, np.int64)[physical]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept with the store, else the one that its attributes name."""
        return stored_tokenizer(self.array)

    def physical_rows(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers in the array, absent row-chunks included."""
        rows = np.asarray(rows, np.int64)
        return self._row_chunks[rows // self.chunks[0]] * self.chunks[0] + rows % self.chunks[0]

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Tokens [rows.stop - rows.start, columns.stop - columns.start]; the bounds must lie inside the store."""
        check_bounds(self, rows, columns)
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
        total = array.metadata.shape[0]
        _log.warning(
            "store %s: %d of %d chunks are missing; %d of %d row-chunks and %d of %d documents are left out",
            address, missing.sum(), missing.size, len(missing) - len(present), len(missing), total - store.num_documents, total,
        )  # fmt: skip
    if store.num_documents == 0:
        raise StoreError(f"store = {address!r}: no complete row of chunks is present")
    return store


def stored_tokenizer(array: ChunkedArray) -> Tokenizer:
    """The tokenizer in the folder `tokenizer/` of the store, else the one that the attributes name."""
    names = (SPEC_FILE, "tokenizer.json", *GPT2_HASHES)
    contents = {name: kv.read_key(array.kvstore, f"{TOKENIZER_FOLDER}/{name}") for name in names}
    files = {name: content for name, content in contents.items() if content is not None}
    if files:
        return tokenizer_from_files(files)
    spec = array.metadata.attributes["tokenizer"]
    return load_tokenizer("gpt2-json" if spec.get("json_escape") else str(spec["kind"]))


def check_bounds(store: Store, rows: slice, columns: slice) -> None:
    """Raise IndexError for a rectangle that is empty, strided or reaches outside the store."""
    for name, bounds, size in (("rows", rows, store.num_documents), ("columns", columns, store.document_length)):
        if bounds.step not in (None, 1) or not 0 <= bounds.start < bounds.stop <= size:
            raise IndexError(
                f"{name} = {bounds}: {store.address!r} has {size} {name}; give 0 <= start < stop <= {size}"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
