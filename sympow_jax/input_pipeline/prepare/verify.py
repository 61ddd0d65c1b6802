"""Checking a store before it is used: metadata, chunks, digests, that every chunk decodes, and the range of tokens."""

import math

import numpy as np

from sympow_jax.input_pipeline.chunked_array import ChunkedArray, StoreError, stored_tokenizer
from sympow_jax.input_pipeline.packing import read_offsets
from sympow_jax.input_pipeline.prepare.progress import Progress


def verify(address: str, *, progress: Progress | None = None) -> list[str]:
    """Everything that is wrong with the store at `address`, one line each; empty when it is sound.

    Every chunk is read once: present, of the digest in manifest.json (where there is one), decodable and in the
    vocabulary.
    """
    try:
        array = ChunkedArray(address)
    except StoreError as error:
        return [str(error)]
    progress = progress or Progress()
    metadata = array.metadata
    faults = _check_attributes(array)
    missing = array.missing()
    progress.start(f"checking {address}", missing.size)
    for index in np.ndindex(metadata.grid):
        progress.advance(1)
        key = metadata.key(*index)
        if missing[index]:
            faults.append(f"store = {address!r}: chunk {key} is missing")
            continue
        bounds = zip(index, metadata.chunks, metadata.shape, strict=True)
        try:
            array.check_chunk(index)
            array.read(*(slice(i * c, min((i + 1) * c, n)) for i, c, n in bounds))
        except StoreError as error:
            faults.append(str(error))
    return faults


def _check_attributes(array: ChunkedArray) -> list[str]:
    faults = []
    attributes = array.metadata.attributes
    shape = array.metadata.shape
    try:
        array.metadata.clusters()
    except ValueError as error:
        faults.append(f"store = {array.address!r}: {error}")
    if not 0 <= int(attributes["bos_id"]) < array.vocab_size:
        faults.append(f"store = {array.address!r}: bos_id {attributes['bos_id']} outside vocab_size {array.vocab_size}")
    tokens = array.manifest.get("counts", {}).get("tokens", math.prod(shape))
    if tokens != math.prod(shape):
        faults.append(f"store = {array.address!r}: manifest says {tokens} tokens, .zarray has shape {shape}")
    recorded = array.manifest.get("chunks", {})
    if recorded and set(recorded) != set(array.metadata.keys()):
        faults.append(
            f"store = {array.address!r}: manifest lists {len(recorded)} chunks, .zarray with shape {list(shape)} and "
            f"chunks {list(array.metadata.chunks)} needs {len(array.metadata.keys())} of other names or number"
        )
    try:
        if len(shape) == 1:
            read_offsets(array)
        recorded = array.manifest.get("tokenizer_sha256")
        if recorded and stored_tokenizer(array).digest != recorded:
            faults.append(f"store = {array.address!r}: its tokenizer has not the sha256 {recorded} of the manifest")
    except ValueError as error:
        faults.append(str(error))
    return faults
