"""From what a config says of its data to batches."""

import logging
import os
import pathlib
import re

from sympow_jax.config import TASKS, TaskConfig
from sympow_jax.files import printable
from sympow_jax.input_pipeline import chunked_array, tfds
from sympow_jax.input_pipeline.batches import StoreBatches, make_batches
from sympow_jax.input_pipeline.metadata import read_metadata
from sympow_jax.input_pipeline.packing import PackedStore, open_packed_store
from sympow_jax.input_pipeline.prepare.corpus import BUILT_IN, default_corpus
from sympow_jax.input_pipeline.store import Store, open_store
from sympow_jax.input_pipeline.tasks.task_store import task_store
from sympow_jax.input_pipeline.token_files import is_token_file
from sympow_jax.input_pipeline.views import BinStore

_log = logging.getLogger(__name__)


def open_data(
    spec: str,
    split: str,
    *,
    seq_len: int,
    missing_chunks: str = "refuse",
    cache_bytes: int = chunked_array.DEFAULT_CACHE_BYTES,
) -> Store:
    """The store that `spec` names: a built-in corpus, tfds:NAME, a file of tokens (.bin, .npy), or a zarr store.

    `split` is "train" or "heldout": which half of python-stdlib, or of a folder that data/prepare.py wrote. A store
    of packed documents, and a TFDS dataset, is cut into windows of `seq_len`. `spec` is spelt as in parse_mixture.
    """
    names, _ = parse_mixture(spec)
    if len(names) > 1:
        raise chunked_array.StoreError(f"data = {spec!r}: a mixture of {len(names)} stores, where one store is needed")
    return _open_named(names[0], split, seq_len=seq_len, missing_chunks=missing_chunks, cache_bytes=cache_bytes)


def _open_named(name: str, split: str, *, seq_len: int, missing_chunks: str, cache_bytes: int) -> Store:
    if name.startswith(tfds.PREFIX):
        return tfds.TfdsStore(name, seq_len=seq_len)
    if name in BUILT_IN:
        name = str(default_corpus(name=name) / f"{split}.zarr")
    elif is_token_file(name):
        return BinStore(name)
    elif pathlib.Path(name).is_file():
        raise chunked_array.StoreError(
            f"data.{split} = {name!r}: is a file, and no file of tokens (.bin, .npy); make a store of it with "
            "`data/prepare.py text`, or, of tokens under another name, `data/prepare.py nanogpt`"
        )
    elif pathlib.Path(name, f"{split}.zarr").is_dir():
        name = str(pathlib.Path(name, f"{split}.zarr"))
    elif any(pathlib.Path(name, f"{other}.zarr").is_dir() for other in ("train", "heldout")):
        raise chunked_array.StoreError(
            f"data.{split} = {name!r}: {split}.zarr has no rows: no document of --document_length fell to it; "
            "prepare it again into another --output with another --document_length or --heldout_fraction"
        )
    if is_packed(name):
        return open_packed_store(name, seq_len=seq_len, cache_bytes=cache_bytes)
    return open_store(name, missing_chunks=missing_chunks, cache_bytes=cache_bytes)


def is_packed(address: str) -> bool:
    """True for a flat store of packed documents."""
    return len(read_metadata(address).shape) == 1


def parse_mixture(spec: str) -> tuple[list[str], list[float]]:
    """Names and weights of `A@3,B@1`; a store without `@weight` has weight 1.

    A comma that belongs to a name, and an `@` with a number behind it, are written `\\,` and `\\@`. Raises StoreError
    for an empty name, and where what is taken apart is also the name of a file or folder.
    """
    names, weights = [], []
    parts = re.split(r"(?<!\\),", spec)
    for part in map(str.strip, parts):
        name, at, number = part.rpartition("@")
        weight = _number(number) if at and not name.endswith("\\") else None
        if weight is None:
            name = part
        if not name:
            raise chunked_array.StoreError(f"data = {spec!r}: a store without a name; write A, or A@WEIGHT,B@WEIGHT")
        if weight is not None:
            _refuse_ambiguous(part)
        names.append(re.sub(r"\\([,@])", r"\1", name))
        weights.append(1.0 if weight is None else weight)
    if len(parts) > 1:
        _refuse_ambiguous(spec)
    return names, weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # an @ that belongs to the address
        return None


def _refuse_ambiguous(name: str) -> None:
    if os.path.exists(name):
        escaped = printable(re.sub("[,@]", r"\\\g<0>", name))
        raise chunked_array.StoreError(
            f"data = {name!r}: a file or folder has this name, which also reads as a mixture of stores; to name the "
            f"file or folder write '{escaped}', in quotes on a command line"
        )


def open_batches(
    spec: str,
    split: str,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    order: str = "rectangle",
    missing_chunks: str = "refuse",
    cache_bytes: int = chunked_array.DEFAULT_CACHE_BYTES,
    process_index: int = 0,
    process_count: int = 1,
    task: TaskConfig | None = None,
) -> StoreBatches:
    """Batches of the store or mixture (`A@3,B@1`) that `spec` names; see open_data and make_batches.

    With `task`, settings of the synthetic tasks, `spec` may be the name of one.
    """
    names, weights = parse_mixture(spec)
    limits = {"missing_chunks": missing_chunks, "cache_bytes": cache_bytes}
    if task is not None and spec in TASKS:
        stores = [task_store(spec, split, seq_len=seq_len, settings=task, seed=seed)]
    else:
        stores = [_open_named(name, split, seq_len=seq_len, **limits) for name in names]
    for store in stores:
        unused = 0 if isinstance(store, PackedStore) else store.document_length % seq_len
        if unused:
            _log.warning(
                "store %s: seq_len %d does not divide %d: the last %d tokens of each document are not used",
                *(store.address, seq_len, store.document_length, unused),
            )
    return make_batches(
        stores,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        order=order,
        weights=weights,
        process_index=process_index,
        process_count=process_count,
    )
