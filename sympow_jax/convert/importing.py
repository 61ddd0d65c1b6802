"""A folder of another library, config.json, safetensors and tokenizer.json, as a new workdir."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sympow_jax.config import Config, ConfigError, nearest
from sympow_jax.convert import plain
from sympow_jax.convert.architecture import make_config
from sympow_jax.convert.families import FAMILIES
from sympow_jax.convert.family import Family, Piece, pieces
from sympow_jax.convert.parts import NotExactError
from sympow_jax.convert.safetensors import TensorFolder
from sympow_jax.files import parse_json, write_json_atomic
from sympow_jax.input_pipeline.tokenizer_base import MAX_VOCABULARY
from sympow_jax.input_pipeline.tokenizers import SPEC_FILE, Tokenizer, load_tokenizer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.initial_weights import layer_places
from sympow_jax.training.manifest import flatten, unflatten

_ALIGNMENT = 64  # bytes
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a folder holds, checked: nothing of it is read into memory yet.

    Attributes:
      kind: its model_type.
      model: of the configuration that it means here.
      tensors: of its files.
      pieces: how they hold the model's parameters.
      tokenizer: of the folder.
    """

    kind: str
    model: Model
    tensors: TensorFolder
    pieces: Sequence[Piece]
    tokenizer: Tokenizer


def import_folder(folder: str, workdir: str) -> Foreign:
    """Makes `workdir`, with a checkpoint of step 0, from `folder`.

    Each array is read, transposed where it has to be and widened to float32 by itself; all of them together, the
    model once in float32, are in memory when they are saved.

    Raises:
      ConfigError, FileError, TokenizerError: something in the folder is missing, wrong or not understood, or the
        workdir is not empty; one line, and nothing is written.
    """
    if pathlib.Path(workdir).exists() and any(pathlib.Path(workdir).iterdir()):
        raise ConfigError(f"--workdir = {workdir!r}: is not empty; name a new folder")
    foreign = open_folder(folder)
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", asynchronous=False) as checkpointer:
        params = read_parameters(foreign)
        checkpointer.save(0, params, metadata={"imported": foreign.kind}, force=True)
    foreign.tokenizer.save(pathlib.Path(workdir) / "tokenizer")
    data = {"train_digest": "", "heldout_digest": "", "tokenizer_digest": foreign.tokenizer.digest}
    data |= {"vocab_size": foreign.model.vocab_size, "bos_id": foreign.tokenizer.bos_id}
    write_json_atomic(pathlib.Path(workdir) / "data.json", data)
    write_json_atomic(pathlib.Path(workdir) / CONFIG, dataclasses.asdict(foreign.model.config))
    return foreign


def open_folder(folder: str) -> Foreign:
    """The content of a folder; see import_folder for errors."""
    path = pathlib.Path(folder) / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder}: has no {CONFIG}; name the folder of a model, as save_pretrained writes it")
    theirs = parse_json(path.read_bytes(), str(path))
    kind = theirs.get("model_type")
    known = (*FAMILIES, plain.MODEL_TYPE)
    if kind not in known:
        hint = nearest(str(kind), known)
        raise ConfigError(f"{path}: model_type = {str(kind)[:60]!r}: known are {', '.join(known)}{hint}")
    family = FAMILIES.get(kind)
    try:
        config = plain.read(theirs) if family is None else _read(family, theirs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    tokenizer, rows = _tokenizer(folder), config.model.vocab_size
    if not tokenizer.vocab_size <= rows <= MAX_VOCABULARY:
        raise ConfigError(
            f"{path}: vocab_size = {rows}: the tokenizer beside it has {tokenizer.vocab_size} ids; legal are "
            f"{tokenizer.vocab_size}..{MAX_VOCABULARY}"
        )
    model = Model(resolve_implementation(config), tokenizer.vocab_size)
    specs = flatten({"params": jax.eval_shape(model.init, jax.random.key(0))})
    places = layer_places(specs, config)
    shapes = {name: specs[at.array].shape[at.index is not None :] for name, at in places.items()}
    try:
        found = plain.pieces(shapes) if family is None else pieces(family, config, shapes)
    except NotExactError as error:
        raise ConfigError(f"{path}: {kind} has no tensor for {error}") from None
    tensors = TensorFolder(folder)
    found = [dataclasses.replace(piece, theirs=_present(piece.theirs, tensors, family)) for piece in found]
    _check_tensors(found, tensors, family)
    return Foreign(kind, model, tensors, found, tokenizer)


def _read(family: Family, theirs: Mapping[str, Any]) -> Config:
    ours = family.read(theirs)
    dtype = str(theirs.get("dtype") or theirs.get("torch_dtype"))
    ours["model.dtype"] = "bfloat16" if dtype == "bfloat16" else "float32"
    return make_config(ours)


def _present(name: str, tensors: TensorFolder, family: Family | None) -> str:
    """The name as it is in files of the bare model, if the whole one is not there."""
    bare = name.removeprefix(family.prefix) if family else name
    return bare if name not in tensors.entries and bare in tensors.entries else name


def _check_tensors(found: Sequence[Piece], tensors: TensorFolder, family: Family | None) -> None:
    """Raises ConfigError unless the files hold exactly the tensors of the model."""
    where, have = tensors.folder, tensors.entries
    for piece in found:
        if not piece.theirs:
            continue
        if piece.theirs not in have:
            raise ConfigError(f"{where}: has no tensor {piece.theirs}, which {CONFIG} asks for")
        entry = have[piece.theirs]
        if entry.dtype is None:
            raise ConfigError(f"{entry.path}: {piece.theirs} is {entry.label}; only floating point numbers are read")
        if entry.shape != piece.shape:
            raise ConfigError(
                f"{entry.path}: {piece.theirs} has shape {list(entry.shape)}, and {CONFIG} asks for {list(piece.shape)}"
            )
    expected = {piece.theirs for piece in found}
    buffers = tuple(family.buffers) if family else ()
    for name in sorted(have.keys() - expected):
        if buffers and name.endswith(buffers):
            continue
        twin = _present(family.duplicate[1], tensors, family) if family and name == family.duplicate[0] else None
        if twin is None or have[name].shape != have[twin].shape or not np.array_equal(tensors[name], tensors[twin]):
            raise ConfigError(f"{have[name].path}: {name} has no place in this model; is {CONFIG} that of the files?")


def read_parameters(foreign: Foreign) -> dict[str, Any]:
    """{"params": nested dict} of the model's parameters, float32, on the devices; each array is read by itself."""
    specs = flatten({"params": jax.eval_shape(foreign.model.init, jax.random.key(0))})
    places = layer_places(specs, foreign.model.config)
    held = {name: (piece, number) for piece in foreign.pieces for number, name in enumerate(piece.ours)}
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place.array, []).append(name)
    params = {}
    for array, names in groups.items():
        whole = _aligned(specs[array].shape)
        for name in names:
            piece, number = held[name]
            index = places[name].index
            target = whole if index is None else whole[index]
            target[...] = _read_one(foreign.tensors, piece, number)
        params[array] = jax.device_put(whole)
    return unflatten(params)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Room for float32 numbers where JAX takes it over without a copy."""
    size = math.prod(shape)
    room = np.empty(size + _ALIGNMENT // 4, np.float32)
    skip = -room.ctypes.data % _ALIGNMENT // 4
    return room[skip : skip + size].reshape(shape)


def _read_one(tensors: TensorFolder, piece: Piece, number: int) -> np.ndarray:
    if not piece.theirs:
        return np.zeros(piece.shapes[number], np.float32)
    return piece.layout.split(tensors[piece.theirs], piece.shapes)[number]


def _tokenizer(folder: str) -> Tokenizer:
    path = pathlib.Path(folder)
    own = path / "tokenizer"
    if not (path / TOKENIZER).is_file() and not (own / SPEC_FILE).is_file():
        raise ConfigError(
            f"{folder}: has no {TOKENIZER}; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return load_tokenizer(path if (path / TOKENIZER).is_file() else own)
