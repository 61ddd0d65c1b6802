"""Folders of safetensors files, one or several with an index, read tensor by tensor and written file by file.

The files themselves are read and written by the library `safetensors`. A file is mapped into memory while a tensor of
it is read, and the tensor is the only copy.
"""

import dataclasses
import importlib
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sympow_jax.config import ConfigError
from sympow_jax.files import FileError, entry, new_file, one_line, parse_json, write_json_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SHARD_BYTES = 2_000_000_000  # of a file that is written, whose tensors are in memory together
_METADATA = {"format": "pt"}  # transformers asks for it


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, the format's word for its dtype, dtype (None: not read here), shape."""

    path: pathlib.Path
    label: str
    dtype: np.dtype | None
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class TensorFolder:
    """The tensors of a folder with model.safetensors, or with an index and the files that it names.

    Attributes:
      entries: name -> Entry of every tensor.

    Raises:
      ConfigError: the library is not installed.
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
        """A tensor, read now."""
        with _opened(self.entries[name].path) as file:
            return file.get_tensor(name)


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file; FileError for a damaged header or a file of another length."""
    with _opened(path) as file:
        about = {name: file.get_slice(name) for name in file.offset_keys()}
        found = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in about.items()}
    return {name: Entry(path, label, DTYPES.get(label), shape) for name, (label, shape) in found.items()}


def _opened(path: pathlib.Path) -> Any:
    library = _library()
    try:
        return library.safe_open(path, framework="numpy")
    except library.SafetensorError as error:
        reason = one_line(error).removeprefix("SafetensorError: ")
        raise FileError(f"{path}: is no whole safetensors file ({reason}); fetch it again") from None


def _library() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ConfigError(f"safetensors cannot be imported ({error}); pip install 'sympow_jax[hf]'") from None


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: its name, shape, and a function that makes it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_folder(folder: pathlib.Path, tensors: Iterable[Pending], dtype: str) -> None:
    """Writes the tensors as files of at most _SHARD_BYTES, made and written one after the other; an index of several.

    Args:
      folder: made if absent.
      tensors: names are unique.
      dtype: "float32" or "bfloat16", of all of them.

    Raises:
      FileError: a file cannot be written; those before it stay.
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
        with new_file(folder / name) as path:
            _save({tensor.name: _made(tensor, kind) for tensor in shard}, path, folder / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        count = sum(math.prod(tensor.shape) for shard in shards for tensor in shard)
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": count * kind.itemsize}, "weight_map": weight_map})


def _save(tensors: Mapping[str, np.ndarray], path: pathlib.Path, name: pathlib.Path) -> None:
    """Writes `path`, which will be `name`, with the mode that a file opened here has: the library's is another."""
    library = _library()
    with open(path, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        library.numpy.save_file(tensors, path, _METADATA)
    except library.SafetensorError as error:
        reason = one_line(error).removeprefix("SafetensorError: ")
        raise FileError(f"{name}: cannot be written ({reason}); make room, remove {name.parent} and repeat") from None
    os.chmod(path, mode)


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _made(tensor: Pending, dtype: np.dtype) -> np.ndarray:
    array = np.ascontiguousarray(tensor.make().astype(dtype, copy=False))
    assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
    return array
