"""Files of the safetensors format, one or several with an index: read tensor by tensor, written piece by piece.

A file is the length of its header (8 bytes, little-endian), the header, a JSON object that gives dtype, shape and byte
range of every tensor, and the bytes. Files are mapped into memory, so that reading a tensor is the only copy of it.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

from sympow_jax.files import FileError, entry, parse_json, write_bytes_atomic, write_json_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD_BYTES = 5_000_000_000
_MAX_HEADER = 100_000_000  # as the format's own library has it
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, the format's word for its dtype, dtype (None: not read here), shape, first byte."""

    path: pathlib.Path
    label: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class TensorFolder:
    """The tensors of a folder with model.safetensors, or with an index and the files that it names.

    Attributes:
      entries: name -> Entry of every tensor.

    Raises:
      FileError: no such files, an index that names absent files, files elsewhere or a tensor twice, a header that is
        damaged, or a file shorter or longer than its header says.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self.entries: dict[str, Entry] = {}
        wanted = self._index()
        for name in sorted({*wanted.values()}) if wanted else [SINGLE]:
            here = read_header(self._inside(name))
            twice = next((tensor for tensor in here if tensor in self.entries), None)
            if twice:
                raise FileError(f"{self.folder / name}: {twice} is in {self.entries[twice].path.name} too; remove one")
            self.entries |= here
        absent = next((tensor for tensor in wanted if tensor not in self.entries), None)
        if absent:
            raise FileError(f"{self.folder / INDEX}: {absent} is not in {wanted[absent]}, which it names for it")

    def _index(self) -> Mapping[str, str]:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return {}
        if not path.is_file():
            other = next(iter(sorted(self.folder.glob("pytorch_model*"))), None)
            hint = f"; {other.name} is not read: save the model again as safetensors" if other else ""
            raise FileError(f"{self.folder}: has neither {SINGLE} nor {INDEX}{hint}")
        files = entry(parse_json(path.read_bytes(), str(path)), "weight_map", dict, str(path))
        for tensor, name in files.items():
            if not isinstance(name, str):
                raise FileError(f"{path}: {tensor} is said to be in {str(name)[:60]!r}, which is no name of a file")
        return files

    def _inside(self, name: str) -> pathlib.Path:
        """The path of a file that the index names; the file itself may be a link, as in a download cache."""
        if pathlib.PurePath(name).name != name:
            raise FileError(f"{self.folder / INDEX}: names {name!r}; files must be in the same folder")
        path = self.folder / name
        if not path.is_file():
            raise FileError(f"{path}: does not exist, and {INDEX} names it; fetch it, or save the model again")
        return path

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor as a view of its file, mapped as long as the view lives."""
        where = self.entries[name]
        assert where.dtype is not None, name
        size = (where.size * where.dtype.itemsize,)
        return np.memmap(where.path, np.uint8, "r", where.begin, size).view(where.dtype).reshape(where.shape)


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file; FileError for a damaged header or a file of another length."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise FileError(f"{path}: is no safetensors file, or was cut off within its header; fetch it again")
        header = parse_json(file.read(length).rstrip(b" "), str(path), max_bytes=_MAX_HEADER)
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, about in header.items():
        where = f"{path}: {name}"
        if not isinstance(about, dict):
            raise FileError(f"{where}: its header is {str(about)[:60]!r}, not an object")
        shape, offsets = entry(about, "shape", list, where), entry(about, "data_offsets", list, where)
        if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, *offsets)) or len(offsets) != 2:
            raise FileError(
                f"{where}: shape {str(shape)[:60]} or data_offsets {str(offsets)[:60]} are no whole numbers"
            )
        end = max(end, offsets[1])
        label = entry(about, "dtype", str, where)
        dtype = DTYPES.get(label)
        if offsets[1] < offsets[0] or (dtype and offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize):
            raise FileError(f"{where}: {offsets[1] - offsets[0]:,} bytes are not those of {label}{shape}")
        entries[name] = Entry(path, label, dtype, tuple(shape), 8 + length + offsets[0])
    if size != 8 + length + end:
        raise FileError(f"{path}: has {size:,} bytes where its header says {8 + length + end:,}; fetch it again")
    return entries


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: its name, shape, and a function that makes it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_folder(folder: pathlib.Path, tensors: Iterable[Pending], dtype: str) -> None:
    """Writes the tensors, made one after the other, as files of at most _SHARD_BYTES, and an index of several.

    Args:
      folder: made if absent.
      tensors: names are unique.
      dtype: "float32" or "bfloat16", of all of them.
    """
    kind = np.dtype(dtype)
    shards: list[list[Pending]] = [[]]
    total = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * kind.itemsize
        if shards[-1] and total + size > _SHARD_BYTES:
            shards, total = [*shards, []], 0
        shards[-1].append(tensor)
        total += size
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_bytes_atomic(folder / name, functools.partial(_write, shard, kind))
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        count = sum(math.prod(tensor.shape) for shard in shards for tensor in shard)
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": count * kind.itemsize}, "weight_map": weight_map})


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write(tensors: Sequence[Pending], dtype: np.dtype, file: IO[bytes]) -> None:
    label = next(label for label, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.make().astype(dtype, copy=False))
        assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
        file.write(array.reshape(-1).view(np.uint8).data)
