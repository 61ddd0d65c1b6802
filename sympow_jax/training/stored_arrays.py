"""What the files of a checkpoint claim, compared with the arrays that are wanted before Orbax reads any of them."""

import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from sympow_jax.files import FileError, entry, parse_json, read_json

_MAX_BYTES = 64 * 2**20  # of a file that is read whole; each array has some hundred bytes there
_DATA = "d"  # folders of OCDBT's data, which is read part by part


def check_stored(step: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    """Raises FileError unless the arrays in the folder of a step can be read in the memory that `wanted` arrays take.

    All files are regular and those that are read whole are small; each array is in chunks no larger than itself, and
    not of a compression that believes a length in the data (zstd stops at the size of a chunk).
    """
    for folder, folders, names in os.walk(step):
        for path in (pathlib.Path(folder, name) for name in (*folders, *names)):
            status = path.lstat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise FileError(f"{path}: is no regular file")
            if stat.S_ISREG(status.st_mode) and status.st_size > _MAX_BYTES and path.parent.name != _DATA:
                raise FileError(f"{path}: has {status.st_size:,} bytes; at most {_MAX_BYTES:,} are read")
    state = step / "state"
    about = read_json(state / "_METADATA", max_bytes=_MAX_BYTES)
    if about.get("use_ocdbt") is not True or about.get("use_zarr3") is not False:
        raise FileError(f"{state / '_METADATA'}: its arrays are not kept as zarr v2 in OCDBT")
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}).result()
    reads = {name: kvstore.read(f"{name.replace('/', '.')}/.zarray") for name in wanted}
    for name, read in reads.items():
        zarray = parse_json(read.result().value, name)
        chunks, shape = entry(zarray, "chunks", list, name), wanted[name].shape
        sizes = zip(chunks, shape, strict=False)
        if len(chunks) != len(shape) or not all(type(chunk) is int and 0 < chunk <= size for chunk, size in sizes):
            raise FileError(f"{name}: is in chunks of {str(chunks)[:80]} where its shape is {list(shape)}")
        if zarray.get("compressor") is not None and entry(zarray, "compressor", dict, name).get("id") != "zstd":
            raise FileError(f"{name}: is compressed with {str(zarray['compressor'])[:80]}, not zstd")
