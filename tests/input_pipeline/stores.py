"""Small stores written for tests."""

import json
import pathlib

import numpy as np

from sympow_jax.input_pipeline.chunked_array import MANIFEST
from sympow_jax.input_pipeline.prepare.writer import Format, write_array, write_json


def write_store(
    folder: pathlib.Path,
    tokens: np.ndarray,
    *,
    chunks: tuple[int, int],
    compressor: str = "blosc",
    vocab_size: int = 257,
    bos_id: int = 256,
    manifest: bool = True,
    clusters: list[int] | None = None,
) -> pathlib.Path:
    """A store that holds `tokens`."""
    layout = Format(tokens.shape, chunks, tokens.dtype.str, compressor)
    digests = write_array(folder, layout, lambda start, stop: tokens[start:stop], ledger=folder.with_suffix(".ledger"))
    attributes = {"tokenizer": {"kind": "byte"}, "vocab_size": vocab_size, "bos_id": bos_id}
    if clusters is not None:
        attributes["clusters"] = clusters
    (folder / ".zattrs").write_text(json.dumps(attributes))
    if manifest:
        write_json(folder / MANIFEST, {"chunks": digests})
    return folder


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...], *, vocab: int = 256) -> np.ndarray:
    """Tokens below `vocab`, frequent ones small."""
    return np.minimum(rng.zipf(1.3, size=shape) - 1, vocab - 1).astype("<u2")
