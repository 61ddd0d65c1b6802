"""A workdir as a folder of another library: the class that computes exactly the same, or the plain format."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sympow_jax import config as config_lib
from sympow_jax.config import Config, ConfigError
from sympow_jax.convert import plain
from sympow_jax.convert.architecture import architecture, make_config
from sympow_jax.convert.families import FAMILIES
from sympow_jax.convert.family import Family, Piece, pieces
from sympow_jax.convert.importing import CONFIG, TOKENIZER
from sympow_jax.convert.parts import NotExactError
from sympow_jax.convert.safetensors import Pending, write_folder
from sympow_jax.files import write_bytes_atomic, write_json_atomic
from sympow_jax.input_pipeline.huggingface import HuggingFaceTokenizer
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer
from sympow_jax.loading import load_step
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.evaluation_mesh import evaluation_mesh
from sympow_jax.training.initial_weights import Place, layer_places
from sympow_jax.training.manifest import flatten
from sympow_jax.training.run_files import load_config

DTYPES = ("float32", "bfloat16")


def export_workdir(workdir: str, output: str, *, step: str | int = "latest", dtype: str = "float32") -> str:
    """Writes the model of a workdir to the folder `output` and returns the name of its class or format.

    Raises:
      ConfigError, CheckpointError, FileError: one line; nothing is written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype = {dtype!r}: choose one of {', '.join(DTYPES)}")
    folder = pathlib.Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output = {output!r}: is not empty; name a new folder")
    config = load_config(workdir)
    _, params, read = load_step(workdir, step, mesh=evaluation_mesh(config, {}))
    tokenizer = load_tokenizer(pathlib.Path(workdir) / "tokenizer")
    arrays = flatten({"params": params})
    places = layer_places(arrays, config)
    shapes = {name: arrays[at.array].shape[at.index is not None :] for name, at in places.items()}
    get = functools.partial(_array, arrays, places)
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        origin = checkpointer.describe(read)[1].get("imported", "")
    name, theirs, found = _target(config, origin, shapes, get)
    if name != plain.MODEL_TYPE:
        theirs |= {"torch_dtype": dtype} | _special(tokenizer)
    tensors = [Pending(piece.theirs, piece.shape, functools.partial(_join, piece, get)) for piece in found]
    write_folder(folder, (tensor for tensor in tensors if tensor.name), dtype)
    _write_tokenizer(tokenizer, folder)
    write_json_atomic(folder / CONFIG, theirs)
    return name


def _target(
    config: Config, origin: str, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray]
) -> tuple[str, dict[str, Any], list[Piece]]:
    """(name of the class, config.json, tensors) of the first family that computes the same, or of the plain format.

    The family that the model came from, `origin`, is tried first.
    """
    rows = shapes["embedding/embedding"][0]
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != origin):
        try:
            theirs = exact(family, config, rows)
            found = pieces(family, config, shapes)
        except (NotExactError, ConfigError):
            continue
        if not any(np.any(get(name)) for piece in found if not piece.theirs for name in piece.ours):
            return family.architecture, theirs, found
    return plain.MODEL_TYPE, plain.write(config, rows), plain.pieces(shapes)


def exact(family: Family, config: Config, num_rows: int) -> dict[str, Any]:
    """The family's configuration, from which the same architecture is read back; `num_rows` is of the embedding.

    Raises:
      NotExactError: it has none.
    """
    own = architecture(config)
    chosen = {"model.vocab_size": num_rows, "attention.scale": own["attention.scale"]}
    theirs = family.write(config_lib.flatten(config) | chosen)
    again = architecture(make_config(family.read(theirs)))
    differs = [key for key in sorted(own.keys() | again.keys()) if not _same(own.get(key), again.get(key))]
    if differs:
        raise NotExactError(f"{differs[0]} = {own.get(differs[0])!r}")
    return theirs


def _same(one: Any, other: Any) -> bool:
    """Equal, or numbers that differ by the rounding of an inverse."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def _array(arrays: Mapping[str, jax.Array], places: Mapping[str, Place], name: str) -> np.ndarray:
    array, index = places[name]
    return np.asarray(arrays[array] if index is None else arrays[array][index])  # no more of it on the host


def _join(piece: Piece, get: Callable[[str], np.ndarray]) -> np.ndarray:
    return piece.layout.join([get(name) for name in piece.ours])


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that begin and end a text, and that none fills one up."""
    eos = [*tokenizer.eos_ids] or [tokenizer.bos_id]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": None}


def _write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """tokenizer.json with the files that name its BOS and EOS, or, of another kind, our own files in tokenizer/."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder / "tokenizer")
        return
    write_bytes_atomic(folder / TOKENIZER, tokenizer.vocabulary_files()[TOKENIZER])
    about = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    about |= {which: tokenizer.name_of(number) for which, number in ids.items() if tokenizer.has_id(number)}
    write_json_atomic(folder / "tokenizer_config.json", about)
    if tokenizer.eos_ids:
        write_json_atomic(folder / "generation_config.json", {"eos_token_id": [*tokenizer.eos_ids]})
