"""Evaluation results on disk: JSON for people and plots, npz for paired comparisons; both replaced atomically."""

import csv
import io
import math
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import numpy as np

from sympow_jax.files import (
    FileError,
    json_sha256,
    one_line,
    open_regular,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

MAX_NPZ_BYTES = 512 * 2**20  # of all arrays of a file, unpacked, or
MAX_NPZ_GROWTH = 16  # times the bytes of the file: numbers hardly shrink, and the state of a long text is gigabytes


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


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes `value` as `plain` to `path`; a reader sees the old file or the whole new one."""
    write_json_atomic(path, plain(value), indent=1)


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays to `path` (no objects, so that reading it never unpickles); atomic like write_json."""
    checked: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in checked.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name}: has dtype object; give numbers or strings")
    write_bytes_atomic(path, lambda file: np.savez_compressed(file, **checked))


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_npz` wrote.

    Raises:
      FileError: missing, damaged, a link, with objects (which are never unpickled), or unpacked larger than
        both MAX_NPZ_BYTES and MAX_NPZ_GROWTH times the file.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        try:
            return _read_arrays(file)
        except Exception as error:  # of the zip archive, of its compression and of numpy
            raise FileError(f"{path}: is no file of arrays ({one_line(error)}); restore it from a copy") from None


def _read_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        most = max(MAX_NPZ_BYTES, MAX_NPZ_GROWTH * os.fstat(file.fileno()).st_size)
        if sum(member.file_size for member in members) > most:
            raise ValueError(f"its arrays take more than {most:,} bytes")
        for member in members:
            with archive.open(member) as content:
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = header[np.lib.format.read_magic(content)](content)
                if math.prod(shape) * dtype.itemsize > member.file_size:  # numpy would allocate what the header claims
                    raise ValueError(f"{member.filename} is shorter than its shape {list(shape)}")
            with archive.open(member) as content:
                arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
    return arrays


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table to `path`, with nothing where a number is not finite; atomic like write_json."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(plain(list(rows)))
    write_text_atomic(path, text.getvalue())


def inputs_digest(inputs: Mapping[str, Any]) -> str:
    """sha256 of what an evaluation was made from; the files of one evaluation carry the same."""
    return f"sha256:{json_sha256(inputs)}"


def write_result(
    folder: str | os.PathLike, name: str, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> pathlib.Path:
    """Writes `folder/name.npz` and then `folder/name.json`; returns the path of the JSON file.

    The npz carries the digest of result["inputs"], if there are any.
    """
    path = pathlib.Path(folder) / f"{name}.json"
    if "inputs" in result:
        arrays = {**arrays, "inputs": np.asarray(inputs_digest(result["inputs"]))}
    write_npz(path.with_name(f"{name}.npz"), arrays)
    write_json(path, result)
    return path


def read_arrays(path: str | os.PathLike, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The npz beside the JSON file `path`, which holds `result`.

    Raises:
      ValueError: the npz is of another evaluation than the JSON: one was written and the other not.
    """
    arrays = read_npz(pathlib.Path(path).with_suffix(".npz"))
    if "inputs" in result and "inputs" in arrays and str(arrays["inputs"]) != inputs_digest(result["inputs"]):
        raise ValueError(f"{path} and its .npz are of different evaluations; evaluate again")
    return arrays
