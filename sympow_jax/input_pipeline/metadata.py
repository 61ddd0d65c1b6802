"""What `.zarray` and `.zattrs` of a store say, checked before anything is allocated from it."""

import dataclasses
import math
from typing import Any

import numpy as np

from sympow_jax.files import FileError, entry, parse_json
from sympow_jax.input_pipeline import kvstore as kv
from sympow_jax.input_pipeline.tokenizer_base import MAX_VOCABULARY

GPT2_ATTRIBUTES = {"vocab_size": 50257, "bos_id": 50256, "tokenizer": {"kind": "gpt2", "json_escape": True}}
MAX_JSON_BYTES = 64 * 2**20  # .zattrs has a number for each row, manifest.json a digest for each chunk
MAX_CHUNKS = 2**20
COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "bz2")
_DTYPES = ("<u2", "<u4")


class StoreError(ValueError):
    """A store that is missing, damaged or not what it claims; the message names the store and the chunk."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `.zarray` and `.zattrs` say."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    compressor: str | None
    separator: str
    attributes: dict[str, Any]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks in each dimension, a ragged last one included."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk; those at the edges are as large."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def key(self, *index: int) -> str:
        """File name of a chunk."""
        return self.separator.join(str(i) for i in index)

    def keys(self) -> list[str]:
        """File names of all chunks, in row-major order."""
        return [self.key(*index) for index in np.ndindex(self.grid)]

    def clusters(self) -> np.ndarray | None:
        """[rows] int64: the source document of each row, where the attributes say so."""
        if self.attributes.get("clusters") is None:
            return None
        try:
            clusters = np.asarray(self.attributes["clusters"])
        except ValueError:  # lists of several lengths
            clusters = np.zeros(0)
        if clusters.dtype.kind != "i" or clusters.shape != self.shape[:1]:
            held = f"{clusters.dtype} of shape {list(clusters.shape)}"
            raise FileError(f".zattrs: clusters are {held}, not a whole number for each of {self.shape[0]} documents")
        return clusters.astype(np.int64)


def read_metadata(address: str) -> Metadata:
    """Metadata of the zarr v2 array at `address`, checked."""
    try:
        kvstore = kv.open_kvstore(address)
        raw = kv.read_key(kvstore, ".zarray", max_bytes=MAX_JSON_BYTES)
        attributes = kv.read_key(kvstore, ".zattrs", max_bytes=MAX_JSON_BYTES)
    except Exception as error:  # network and permission errors come in many types
        raise StoreError(f"store = {address!r}: cannot be read ({' '.join(str(error).split())[:300]})") from None
    if raw is None:
        raise StoreError(f"store = {address!r}: {_what_else(kvstore)}")
    try:
        return _parse(raw, attributes or b"{}")
    except FileError as error:
        raise StoreError(f"store = {address!r}: {error}") from None


def _what_else(kvstore: kv.ts.KvStore) -> str:
    """What lies there in place of a zarr v2 array, and what to do with it."""
    others = {
        "zarr.json": "zarr v3, but v2 is read; write it again with zarr_format=2",
        ".zgroup": "a zarr group; name the array in it",
        "state.json": "a Hugging Face dataset; make a store of it with `data/prepare.py text FOLDER`",
        "dataset_dict.json": "several Hugging Face datasets; make a store of one with `data/prepare.py text FOLDER`",
    }
    for name, what in others.items():
        if kv.read_key(kvstore, name, max_bytes=MAX_JSON_BYTES) is not None:
            return f"holds {what}"
    return "no zarr v2 array there (no .zarray); make one with data/prepare.py"


def _parse(raw: bytes, attributes: bytes) -> Metadata:
    zarray = parse_json(raw, ".zarray")
    dtype, order = zarray.get("dtype"), zarray.get("order", "C")
    if dtype not in _DTYPES or order != "C":
        held = f"dtype {str(dtype)[:60]!r}, order {str(order)[:60]!r}"
        raise FileError(f".zarray: {held}; legal are {' and '.join(_DTYPES)} in C order")
    shape, chunks = _sizes(zarray, "shape"), _sizes(zarray, "chunks")
    separator, filters = zarray.get("dimension_separator", "."), zarray.get("filters")
    compressor = zarray.get("compressor")
    name = compressor.get("id") if isinstance(compressor, dict) else compressor
    if len(chunks) != len(shape):
        raise FileError(f".zarray: chunks = {list(chunks)} has not as many dimensions as shape = {list(shape)}")
    if separator not in (".", "/"):
        raise FileError(f".zarray: dimension_separator = {str(separator)[:60]!r}; legal are . and /")
    if filters:
        raise FileError(f".zarray: filters = {str(filters)[:60]}; none are known")
    if compressor is not None and name not in COMPRESSORS:
        raise FileError(f".zarray: compressor = {str(name)[:60]!r}; legal are {', '.join(COMPRESSORS)} and null")
    merged = {**GPT2_ATTRIBUTES, **parse_json(attributes, ".zattrs", max_bytes=MAX_JSON_BYTES)}
    entry(merged, "vocab_size", int, ".zattrs", least=1, most=MAX_VOCABULARY)
    entry(merged, "bos_id", int, ".zattrs", least=0, most=MAX_VOCABULARY)
    entry(merged, "tokenizer", dict, ".zattrs")
    metadata = Metadata(shape, chunks, np.dtype(dtype), name, separator, merged)
    if math.prod(metadata.grid) > MAX_CHUNKS:
        count = f"{math.prod(metadata.grid):,} chunks of {list(chunks)}"
        raise FileError(f".zarray: shape = {list(shape)} takes {count}; at most {MAX_CHUNKS:,} are read")
    return metadata


def _sizes(zarray: dict[str, Any], name: str) -> tuple[int, ...]:
    sizes = entry(zarray, name, list, ".zarray")
    if not 1 <= len(sizes) <= 2 or not all(type(size) is int and 1 <= size < 2**62 for size in sizes):
        raise FileError(f".zarray: {name} = {str(sizes)[:80]}; it is one or two positive whole numbers")
    return tuple(sizes)
