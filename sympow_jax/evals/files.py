"""Evaluation results on disk: JSON for people and plots, npz for paired comparisons; both replaced atomically."""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np


def plain(value: Any) -> Any:
    """`value` as JSON types; NaN and infinities become None, because JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(file.name, 0o666 & ~umask)
    os.replace(file.name, path)


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes `value` to `path`; a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomic like write_json."""
    _replace(pathlib.Path(path), lambda file: file.write(text.encode()))


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays to `path` (no objects, so that reading it never unpickles); atomic like write_json."""
    checked: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in checked.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name}: has dtype object; give numbers or strings")
    _replace(pathlib.Path(path), lambda file: np.savez_compressed(file, **checked))


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_npz` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_result(
    folder: str | os.PathLike, name: str, result: Mapping, arrays: Mapping[str, np.ndarray]
) -> pathlib.Path:
    """Writes `folder/name.json` and `folder/name.npz`; returns the path of the JSON file."""
    path = pathlib.Path(folder) / f"{name}.json"
    write_npz(path.with_suffix(".npz"), arrays)
    write_json(path, result)
    return path
