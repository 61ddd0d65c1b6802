"""Documents of parquet and Arrow files, the text in one column, read batch by batch."""

import pathlib
from collections.abc import Iterator
from typing import Any

from sympow_jax.files import parse_json
from sympow_jax.input_pipeline.prepare.decompress import DamagedError

_STATE = "state.json"  # of a folder that datasets' save_to_disk wrote
_STATE_FILES = {_STATE, "dataset_info.json", "dataset_dict.json"}
_BATCH = 1024  # rows of a parquet file read at a time


def table_rows(path: pathlib.Path, kind: str, column: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of each row; `kind` as file_formats.recognise names it.

    Raises DamagedError for a column that is absent or no text, an empty cell and whatever cannot be decoded.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path, kind, column):
            batch.validate(full=True)  # offsets inside the data, text valid UTF-8
            for text in batch.column(0).to_pylist():
                number += 1
                if text is None:
                    raise DamagedError(f"row {number} has no text in column {column!r}; remove it")
                yield number, text
    except pa.ArrowException as error:
        raise DamagedError(f"row {number + 1} or later cannot be read: {error}") from None


def _batches(path: pathlib.Path, kind: str, column: str) -> Iterator[Any]:
    """Record batches of the one column."""
    import pyarrow as pa

    if kind == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            _check_column(file.schema_arrow, column)
            yield from file.iter_batches(batch_size=_BATCH, columns=[column])
        return
    with pa.memory_map(str(path)) as source:
        if kind == "arrow_file":
            with pa.ipc.open_file(source) as file:
                _check_column(file.schema, column)
                for index in range(file.num_record_batches):
                    yield file.get_batch(index).select([column])
        else:
            with pa.ipc.open_stream(source) as stream:
                _check_column(stream.schema, column)
                for batch in stream:
                    yield batch.select([column])


def _check_column(schema: Any, column: str) -> None:
    import pyarrow as pa

    kinds = [field.type for field in schema if field.name == column]
    if len(kinds) != 1:
        raise DamagedError(f"has {len(kinds) or 'no'} columns {column!r} among {schema.names[:20]}; set --field")
    kind = kinds[0].value_type if pa.types.is_dictionary(kinds[0]) else kinds[0]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DamagedError(f"column {column!r} holds {kinds[0]}, but text is needed; set --field")


def split_dataset_folder(folder: pathlib.Path, names: list[str]) -> tuple[list[str], list[str]]:
    """(names to read, names of its own bookkeeping) in a folder that `datasets` may have saved.

    There state.json lists the shards; other .arrow files are caches of derived data. Raises DamagedError if a
    shard is missing.
    """
    if _STATE not in names:
        own = [name for name in names if name == "dataset_dict.json"]
        return [name for name in names if name not in own], own
    try:
        state = parse_json((folder / _STATE).read_bytes(), _STATE)
        shards = {str(entry["filename"]) for entry in state["_data_files"]}
    except (ValueError, KeyError, TypeError):
        return names, []  # somebody else's state.json
    if missing := sorted(shards - set(names)):
        raise DamagedError(f"{_STATE} lists {missing[0]!r}, which is not there; fetch it")
    own = [name for name in names if name in _STATE_FILES or (name.endswith(".arrow") and name not in shards)]
    return [name for name in names if name not in own], own
