"""One zarr v2 array of tokens, checked chunk by chunk as it is read."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np
import tensorstore as ts

from sympow_jax.input_pipeline import kvstore as kv
from sympow_jax.input_pipeline.tokenizers import GPT2_HASHES, SPEC_FILE, Tokenizer, load_tokenizer, tokenizer_from_files

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DEFAULT_CACHE_BYTES = 2**30
GPT2_ATTRIBUTES = {"vocab_size": 50257, "bos_id": 50256, "tokenizer": {"kind": "gpt2", "json_escape": True}}


class StoreError(ValueError):
    """A store that is missing, damaged or not what it claims; the message names the store and the chunk."""


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


def read_metadata(address: str) -> Metadata:
    """Metadata of the zarr v2 array at `address`, checked."""
    try:
        kvstore = kv.open_kvstore(address)
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
            f"store = {address!r}: dtype {zarray['dtype']!r}, order {zarray.get('order')!r}; "
            "legal are <u2 and <u4 in C order"
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
    """A zarr array, checked as it is read: chunks present, decodable, of the recorded digest, in the vocabulary.

    Digests are compared for local stores; `data/prepare.py verify` does it for any.
    """

    def __init__(self, address: str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.address = str(address)
        self.cache_bytes = cache_bytes
        self.kvstore = kv.open_kvstore(self.address)
        self.metadata = read_metadata(self.address)
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
        total.update("\n".join(sorted(self._present)).encode())
        return f"listing:{total.hexdigest()}"

    @functools.cached_property
    def _present(self) -> set[str]:
        """The chunk files that exist, listed once: over http a listing is a request for each chunk."""
        return kv.present_keys(self.address, self.kvstore, self.metadata.keys())

    def missing(self) -> np.ndarray:
        """Boolean [grid]: True where a chunk is absent, found by listing."""
        keys = self.metadata.keys()
        return np.array([key not in self._present for key in keys]).reshape(self.metadata.grid)

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
        """Raise StoreError unless the file of chunk `index` has the digest that the manifest, if any, records."""
        if not self._digests:
            return
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


def stored_tokenizer(array: ChunkedArray) -> Tokenizer:
    """The tokenizer in the folder `tokenizer/` of the store, else the one that the attributes name.

    GPT-2's two vocabulary files are enough there: LongCrawl64 has no such folder, and a machine without a network needs
    one.
    """
    names = (SPEC_FILE, "tokenizer.json", *GPT2_HASHES)
    contents = {name: kv.read_key(array.kvstore, f"{TOKENIZER_FOLDER}/{name}") for name in names}
    files = {name: content for name, content in contents.items() if content is not None}
    spec = array.metadata.attributes["tokenizer"]
    if files:
        return tokenizer_from_files({SPEC_FILE: json.dumps(spec).encode(), **files})
    return load_tokenizer("gpt2-json" if spec.get("json_escape") else str(spec["kind"]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
