"""Models that no class of transformers computes: config.json of a workdir, and tensors by our own names.

A tensor is called as its parameter is by layer, with dots: "layers.0.mixer.query.kernel" [E, H D]. All are float32 or
bfloat16 in C order, as they are in a workdir.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sympow_jax.config import Config, ConfigError, resolve_saved
from sympow_jax.convert.family import Piece
from sympow_jax.convert.layouts import Columns
from sympow_jax.convert.parts import typed

MODEL_TYPE = "sympow_jax"


def write(config: Config, num_rows: int) -> dict[str, Any]:
    """config.json of a model whose embedding has `num_rows`."""
    model = dataclasses.replace(config.model, vocab_size=num_rows)
    return {"model_type": MODEL_TYPE, "config": dataclasses.asdict(dataclasses.replace(config, model=model))}


def read(theirs: Mapping[str, Any]) -> Config:
    """The configuration; ConfigError for another content."""
    for name in theirs:
        if name not in ("model_type", "config"):
            raise ConfigError(f"{name}: no such key of {MODEL_TYPE}")
    return resolve_saved(typed("config", theirs.get("config"), dict))


def pieces(shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Each array of ours as a tensor."""
    layout = Columns()
    return [Piece(name.replace("/", "."), (name,), (shape,), layout) for name, shape in shapes.items()]
