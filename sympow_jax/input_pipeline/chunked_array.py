"""One zarr v2 array of tokens, checked chunk by chunk as it is read."""

import functools
import hashlib
import json
from typing import Any

import numpy as np
import tensorstore as ts

from sympow_jax.files import FileError, entry, parse_json, sha256
from sympow_jax.input_pipeline import kvstore as kv
from sympow_jax.input_pipeline.metadata import MAX_JSON_BYTES, StoreError, read_metadata
from sympow_jax.input_pipeline.tokenizers import GPT2_HASHES, SPEC_FILE, Tokenizer, load_tokenizer, tokenizer_from_files

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DEFAULT_CACHE_BYTES = 2**30
_BLOSC_HEADER = 16  # bytes; 4 to 8 are the decoded size


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

    Decoded sizes are checked before a chunk is first decoded, and digests of local stores; those of any are checked by
    `data/prepare.py verify`.
    """

    def __init__(self, address: str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.address = str(address)
        self.cache_bytes = cache_bytes
        self.kvstore = kv.open_kvstore(self.address)
        self.metadata = read_metadata(self.address)
        if self.metadata.chunk_bytes > cache_bytes:
            size = f"a chunk of {list(self.metadata.chunks)} takes {self.metadata.chunk_bytes:,} bytes"
            raise StoreError(f"store = {self.address!r}: {size}, more than data.cache_bytes = {cache_bytes}")
        self._array = open_array(self.address, cache_bytes=cache_bytes)
        self.vocab_size = int(self.metadata.attributes["vocab_size"])
        self.manifest = self._read_manifest()
        self._digests: dict[str, str] = self.manifest.get("chunks", {})
        self._remote = kv.is_remote(self.address)
        self._unchecked = np.full(self.metadata.grid, not self._remote or self.metadata.compressor == "blosc")

    def _read_manifest(self) -> dict[str, Any]:
        try:
            content = kv.read_key(self.kvstore, MANIFEST, max_bytes=MAX_JSON_BYTES)
            manifest = parse_json(content, MANIFEST, max_bytes=MAX_JSON_BYTES) if content else {}
            for name in ("chunks", "counts"):
                entry({name: {}} | manifest, name, dict, MANIFEST)
        except FileError as error:
            raise StoreError(f"store = {self.address!r}: {error}") from None
        return manifest

    @functools.cached_property
    def digest(self) -> str:
        """`sha256:` over metadata and chunk digests, or `listing:` over metadata and chunk names without a manifest."""
        total = hashlib.sha256()
        for name in (".zarray", ".zattrs"):
            total.update((kv.read_key(self.kvstore, name, max_bytes=MAX_JSON_BYTES) or b"") + b"\0")
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
            self._check_chunks(touched)
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

    def check_chunk(self, index: tuple[int, ...], *, digest: bool = True) -> None:
        """Raise StoreError unless chunk `index` has the digest on record, if any, and decodes to one chunk at most.

        Without `digest` its first bytes are enough.
        """
        key, packer = self.metadata.key(*index), self.metadata.compressor
        name = f"store = {self.address!r}: chunk {key}"
        recorded = self._digests if digest else {}
        head = None if recorded else _BLOSC_HEADER
        try:
            content = kv.read_key(self.kvstore, key, max_bytes=2 * self.metadata.chunk_bytes + 2**20, head=head)
        except FileError as error:
            raise StoreError(f"{name} cannot be read ({error}); fetch or prepare it again") from None
        if content is None:
            raise StoreError(f"{name} is missing; fetch or prepare it again")
        if recorded:
            found, wanted = sha256(content), str(recorded.get(key, "nothing"))
            if found != wanted:
                both = f"sha256 {found[:12]}, the manifest says {wanted[:12]}"
                raise StoreError(f"{name} is damaged: {both}; fetch or prepare it again")
        decoded = int.from_bytes(content[4:8], "little")
        if packer == "blosc" and decoded > self.metadata.chunk_bytes:  # other decoders stop at the size of a chunk
            sizes = f"it has {decoded:,} bytes, and a chunk {self.metadata.chunk_bytes:,}"
            raise StoreError(f"{name} cannot be decoded ({sizes}); fetch or prepare it again")

    def _check_chunks(self, touched: tuple[slice, ...]) -> None:
        for index in self._indices(touched):
            if self._unchecked[index]:
                self.check_chunk(index, digest=not self._remote)
                self._unchecked[index] = False

    def _name_unreadable(self, touched: tuple[slice, ...]) -> None:
        for index in self._indices(touched):
            bounds = zip(index, self.metadata.chunks, self.metadata.shape, strict=True)
            region = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in bounds)
            try:
                self._array[region].read().result()
            except ValueError as error:
                absent = kv.read_key(self.kvstore, self.metadata.key(*index), max_bytes=2**62, head=0) is None
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
    contents = {
        name: kv.read_key(array.kvstore, f"{TOKENIZER_FOLDER}/{name}", max_bytes=MAX_JSON_BYTES) for name in names
    }
    files = {name: content for name, content in contents.items() if content is not None}
    spec = array.metadata.attributes["tokenizer"]
    if files:
        return tokenizer_from_files({SPEC_FILE: json.dumps(spec).encode(), **files})
    return load_tokenizer("gpt2-json" if spec.get("json_escape") else entry(spec, "kind", str, ".zattrs: tokenizer"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
