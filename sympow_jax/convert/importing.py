"""A folder of another library, config.json, safetensors and tokenizer.json, as a new workdir."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sympow_jax.config import Config, ConfigError, nearest, override
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
from sympow_jax.sharding.agreement import gather
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.evaluation_mesh import evaluation_mesh
from sympow_jax.training.initial_weights import layer_places
from sympow_jax.training.manifest import flatten, unflatten
from sympow_jax.training.train_state import abstract_params

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a folder holds, checked: nothing of it is read into memory yet.

    Attributes:
      kind: its model_type.
      model: of the configuration that it means here, on the mesh.
      specs: shapes, dtypes and shardings of the model's arrays, by name.
      tensors: of its files.
      pieces: how they hold the model's parameters.
      tokenizer: of the folder.
    """

    kind: str
    model: Model
    specs: Mapping[str, jax.ShapeDtypeStruct]
    tensors: TensorFolder
    pieces: Sequence[Piece]
    tokenizer: Tokenizer


def import_folder(folder: str, workdir: str, *, mesh: Mapping[str, int] | None = None) -> Foreign:
    """Makes `workdir`, with a checkpoint of step 0, from `folder`.

    Args:
      folder: of another library.
      workdir: absent or empty; of several processes the first one writes it, with the others the checkpoint.
      mesh: sizes of axes: the devices that the parameters are laid onto, and the mesh of the workdir; an axis left out
        is 1, and data what the others leave. None or empty: one device, or all along data where there are several
        processes.

    Raises:
      ConfigError, FileError, TokenizerError: something in the folder is missing, wrong or not understood, the
        workdir is not empty, or the mesh does not fit; one line, and nothing is written.
    """
    if any(gather("workdir", pathlib.Path(workdir).exists() and any(pathlib.Path(workdir).iterdir()))):
        raise ConfigError(f"--workdir = {workdir!r}: is not empty; name a new folder")
    foreign = open_folder(folder, mesh)
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", asynchronous=False) as checkpointer:
        params = read_parameters(foreign)
        checkpointer.save(0, params, metadata={"imported": foreign.kind}, force=True)
    if jax.process_index() == 0:
        _write_files(foreign, pathlib.Path(workdir))
    return foreign


def _write_files(foreign: Foreign, workdir: pathlib.Path) -> None:
    """Everything of a workdir besides the checkpoint; config.json, which makes it one, is last."""
    foreign.tokenizer.save(workdir / "tokenizer")
    data = {"train_digest": "", "heldout_digest": "", "tokenizer_digest": foreign.tokenizer.digest}
    data |= {"vocab_size": foreign.model.vocab_size, "bos_id": foreign.tokenizer.bos_id}
    write_json_atomic(workdir / "data.json", data)
    write_json_atomic(workdir / CONFIG, dataclasses.asdict(foreign.model.config))


def open_folder(folder: str, mesh: Mapping[str, int] | None = None) -> Foreign:
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
    tokenizer = _of_rows(_tokenizer(folder), config.model.vocab_size, path)
    model = _on_mesh(resolve_implementation(config), tokenizer.vocab_size, mesh or {})
    specs = flatten({"params": abstract_params(model)})
    places = layer_places(specs, config)
    shapes = {name: specs[at.array].shape[at.index is not None :] for name, at in places.items()}
    try:
        found = plain.pieces(shapes) if family is None else pieces(family, config, shapes)
    except NotExactError as error:
        raise ConfigError(f"{path}: {kind} has no tensor for {error}") from None
    tensors = TensorFolder(folder)
    found = [dataclasses.replace(piece, theirs=_present(piece.theirs, tensors, family)) for piece in found]
    _check_tensors(found, tensors, family)
    return Foreign(kind, model, specs, tensors, found, tokenizer)


def _on_mesh(config: Config, vocab_size: int, asked: Mapping[str, int]) -> Model:
    if not asked and jax.process_count() == 1:
        return Model(config, vocab_size)
    mesh = evaluation_mesh(config, asked)
    return Model(override(config, {f"mesh.{axis}": size for axis, size in mesh.shape.items()}), vocab_size, mesh)


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
    """{"params": nested dict} of the model's parameters, float32, where they live on its mesh.

    Each tensor is read once, and is all of the model that is in memory besides what has reached its devices.
    """
    specs = foreign.specs
    places = layer_places(specs, foreign.model.config)
    params: dict[str, jax.Array] = {}
    for piece in foreign.pieces:
        for name, part in zip(piece.ours, _parts(foreign.tensors, piece), strict=True):
            array, layer = places[name]
            value = np.ascontiguousarray(part, np.float32)
            if layer is None:
                params[array] = _placed(value, specs[array].sharding)
                continue
            if array not in params:
                params[array] = jnp.zeros(specs[array].shape, jnp.float32, device=specs[array].sharding)
            params[array] = _put_layer(params[array], _placed(value, _of_layer(specs[array].sharding)), layer)
    return unflatten({array: params[array] for array in specs})


def _parts(tensors: TensorFolder, piece: Piece) -> list[np.ndarray]:
    if not piece.theirs:
        return [np.zeros(shape, np.float32) for shape in piece.shapes]
    return piece.layout.split(tensors[piece.theirs], piece.shapes)


def _placed(value: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """`value` cut as its sharding says; each process has all of it."""
    if sharding is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _of_layer(stacked: NamedSharding | None) -> NamedSharding | None:
    return stacked and NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stacked: jax.Array, value: jax.Array, layer: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, 0)


def _of_rows(tokenizer: Tokenizer, rows: int, path: pathlib.Path) -> Tokenizer:
    """The tokenizer, without special tokens that the embedding has no rows for."""
    if not tokenizer.least_rows <= rows <= MAX_VOCABULARY:
        raise ConfigError(
            f"{path}: vocab_size = {rows}: the tokenizer beside it has {tokenizer.vocab_size} ids; legal are "
            f"{tokenizer.least_rows}..{MAX_VOCABULARY}"
        )
    return tokenizer.with_rows(rows)


def _tokenizer(folder: str) -> Tokenizer:
    path = pathlib.Path(folder)
    own = path / "tokenizer"
    if not (path / TOKENIZER).is_file() and not (own / SPEC_FILE).is_file():
        raise ConfigError(
            f"{folder}: has no {TOKENIZER}; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return load_tokenizer(path if (path / TOKENIZER).is_file() else own)
