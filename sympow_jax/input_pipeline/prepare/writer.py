"""Writing zarr v2 stores in LongCrawl64's layout, chunk row by chunk row, resumable and to the byte reproducible."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from sympow_jax.files import file_sha256, read_json, write_bytes_atomic, write_json_atomic
from sympow_jax.input_pipeline.chunked_array import MANIFEST, TOKENIZER_FOLDER
from sympow_jax.input_pipeline.tokenizers import Tokenizer

COMPRESSORS: dict[str, dict[str, Any] | None] = {
    "blosc": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0},
    "zstd": {"id": "zstd", "level": 3},
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Format:
    """How an array is laid out; the defaults are LongCrawl64's."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str = "<u2"
    compressor: str = "blosc"

    def zarray(self) -> dict[str, Any]:
        """The content of `.zarray`."""
        return {
            "chunks": list(self.chunks),
            "compressor": COMPRESSORS[self.compressor],
            "dtype": self.dtype,
            "fill_value": 0,
            "filters": None,
            "order": "C",
            "shape": list(self.shape),
            "zarr_format": 2,
        }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write canonical JSON; see write_json_atomic."""
    write_json_atomic(path, value, indent=1, sort_keys=True)


def write_array(
    folder: pathlib.Path,
    layout: Format,
    rows: Callable[[int, int], np.ndarray],
    *,
    ledger: pathlib.Path,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, str]:
    """Write the array whose first-dimension range [start, stop) is `rows(start, stop)`; returns sha256 by chunk file.

    Finished chunk rows are noted in `ledger` and not written again after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger.mkdir(parents=True, exist_ok=True)
    write_json(folder / ".zarray", layout.zarray())
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
        "store_data_equal_to_fill_value": True,
    }
    array = ts.open(spec, open=True, write=True, read=True, context=ts.Context()).result()
    digests: dict[str, str] = {}
    height = layout.chunks[0]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, start in enumerate(range(0, layout.shape[0], height)):
            stop = min(start + height, layout.shape[0])
            note = ledger / f"{number:06d}.json"
            if not note.exists():
                array[start:stop].write(rows(start, stop)).result()
                keys = [".".join(map(str, (number, *rest))) for rest in np.ndindex(_column_grid(layout))]
                write_json(note, dict(zip(keys, pool.map(file_sha256, [folder / k for k in keys]), strict=True)))
            digests |= read_json(note)
            advance(stop - start)
    return digests


def finish_store(
    folder: pathlib.Path,
    *,
    attributes: dict[str, Any],
    manifest: dict[str, Any],
    digests: dict[str, str],
    tokenizer: Tokenizer,
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """Write attributes, tokenizer and manifest, and remove what an interrupted writer left behind."""
    write_json(folder / ".zattrs", attributes)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    for name, content in (extra_files or {}).items():
        write_bytes_atomic(folder / name, content)
    write_json(folder / MANIFEST, {**manifest, "chunks": digests})
    expected = {".zarray", ".zattrs", MANIFEST, TOKENIZER_FOLDER, *digests, *(extra_files or {})}
    for path in folder.iterdir():
        if path.name not in expected:
            path.unlink()


def _column_grid(layout: Format) -> tuple[int, ...]:
    return tuple(-(-size // chunk) for size, chunk in zip(layout.shape[1:], layout.chunks[1:], strict=True))
