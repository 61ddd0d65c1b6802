"""States on disk: arrays and JSON, checked against the model that they continue. Nothing in them is executed."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import config as config_lib
from sympow_jax import sharding
from sympow_jax.config import Config, ConfigError
from sympow_jax.config.absent import ABSENT
from sympow_jax.evals.files import plain, read_npz, write_json, write_npz
from sympow_jax.files import entry, file_sha256, json_sha256, read_json
from sympow_jax.generation.decoder import RECENT, Decoder, Stream
from sympow_jax.layers.state_specs import named_arrays
from sympow_jax.training import manifest
from sympow_jax.training.digests import digest_arrays
from sympow_jax.typing import PyTree

FORMAT = 1
_COMPUTED_ALIKE = (
    "attention.implementation",
    "attention.chunk_size",
    "model.scan_layers",
    "model.remat",
    "model.loss_block",
)


def save_state(folder: str | pathlib.Path, decoder: Decoder, stream: Stream, params: PyTree) -> None:
    """Writes folder/state.npz (the state and the next logits) and folder/state.json (what they belong to).

    All processes of a mesh call this, and the first one writes.

    Slots of caches that were not written are left out. Both files are replaced atomically, the JSON last; it holds
    the digest of the arrays, so that a pair that does not belong together is noticed.
    """
    folder = pathlib.Path(folder)
    small = jax.eval_shape(lambda: decoder.model.initial_state(stream.batch_size, max(stream.tokens_read, 1)))
    arrays = {}
    for name, leaf in named_arrays(stream.state).items():
        arrays[name] = sharding.fetch(leaf)[tuple(slice(0, size) for size in named_arrays(small)[name].shape)]
    if stream.logits is None:
        raise ConfigError("--save_state: nothing was read; give a prompt")
    arrays["logits"], digest = sharding.fetch(stream.logits), params_digest(params)
    if jax.process_index() != 0:
        return
    write_npz(folder / "state.npz", {name: _storable(np.asarray(array)) for name, array in arrays.items()})
    about = {
        "format": FORMAT,
        "tokens_read": stream.tokens_read,
        "batch_size": stream.batch_size,
        "recent": stream.recent.tolist(),
        "config": _identity(decoder.model.config),
        "params": digest,
        "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
        "arrays": file_sha256(folder / "state.npz"),
    }
    write_json(folder / "state.json", about | {"digest": json_sha256(plain(about))})


def load_state(
    folder: str | pathlib.Path, decoder: Decoder, params: PyTree, *, batch_size: int, extra_length: int
) -> Stream:
    """The saved stream, with room for `extra_length` more tokens.

    Args:
      folder: written by `save_state`.
      decoder, params: the model that the state is to be continued with.
      batch_size: of the new stream; a state of one row is copied to each.
      extra_length: tokens that will be read; only caches need room for them.

    Raises:
      ConfigError: another config or checkpoint, another batch size, or damaged files.
    """
    folder = pathlib.Path(folder)
    about = _read_about(folder)
    arrays = _read_arrays(folder, about)
    _check_owner(folder, about, decoder.model.config, params)
    _check_shapes(folder, about, decoder, arrays)
    rows = about["batch_size"]
    if rows not in (1, batch_size):
        raise ConfigError(
            f"--load_state = {folder}: holds {rows} rows, and the batch is {batch_size}; use --batch={rows}"
        )
    stream = decoder.start(batch_size, about["tokens_read"] + extra_length)
    empty = named_arrays(stream.state)
    filled = {name: _restore(folder, name, leaf, arrays[name], batch_size) for name, leaf in empty.items()}
    treedef = jax.tree.structure(stream.state)
    stream.state = jax.tree.unflatten(treedef, [filled[name] for name in empty])
    stream.logits = jnp.asarray(_repeat(arrays["logits"], batch_size))
    stream.tokens_read = about["tokens_read"]
    stream.recent = _repeat(_recent(folder, about, decoder.model.vocab_size), batch_size)
    return stream


def _restore(folder: pathlib.Path, name: str, empty: jax.Array, saved: np.ndarray, batch_size: int) -> jax.Array:
    """The saved array at the start of an empty one: all of it, or the written slots of a cache."""
    saved, full = _repeat(saved, batch_size), np.array(sharding.fetch(empty))
    if (
        saved.ndim != full.ndim
        or saved.dtype != full.dtype
        or any(a > b for a, b in zip(saved.shape, full.shape, strict=True))
    ):
        raise ConfigError(
            f"--load_state = {folder}: {name} is {saved.dtype}{list(saved.shape)}, which does not fit "
            f"{full.dtype}{list(full.shape)}; save it again"
        )
    full[tuple(slice(0, size) for size in saved.shape)] = saved
    return jax.make_array_from_callback(full.shape, empty.sharding, lambda index: full[index])


def _recent(folder: pathlib.Path, about: Mapping[str, Any], vocab_size: int) -> np.ndarray:
    """The last tokens read, [rows, n] int32; none where the state was saved before they were kept."""
    rows = about.get("recent", [[]] * about["batch_size"])
    try:
        recent = np.asarray(rows, np.int64).reshape(about["batch_size"], -1)
    except (TypeError, ValueError, OverflowError):
        recent = np.full((1, 1), -1)
    if recent.shape[1] > RECENT or (recent.size and not 0 <= recent.min() <= recent.max() < vocab_size):
        raise ConfigError(f"--load_state = {folder}: recent holds no token ids of this model; save the state again")
    return recent.astype(np.int32)


def _repeat(array: np.ndarray, batch_size: int) -> np.ndarray:
    return np.repeat(array, batch_size, axis=0) if array.ndim and array.shape[0] == 1 else array


def params_digest(params: PyTree) -> str:
    """One digest of all parameters, names and values."""
    return json_sha256(digest_arrays(manifest.flatten(params)))


def _identity(config: Config) -> dict[str, Any]:
    """The settings that decide what a state means."""
    flat = config_lib.flatten(config)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flat.items()
        if name.split(".")[0] in ("model", "attention", "position") and name not in _COMPUTED_ALIKE
    }


def _check_owner(folder: pathlib.Path, about: Mapping[str, Any], config: Config, params: PyTree) -> None:
    identity = _identity(config)
    meant = {name: value for name, value in ABSENT if name in identity}
    changes = config_lib.diff(meant | about["config"], identity)
    if changes:
        name, (old, new) = next(iter(changes.items()))
        raise ConfigError(
            f"--load_state = {folder}: {name} was {old!r} and is {new!r} now; load it with the model it is of"
        )
    if about["params"] != params_digest(params):
        raise ConfigError(
            f"--load_state = {folder}: belongs to other parameters, of another step or run; use --workdir and --step"
        )


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "state.json"
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise ConfigError(f"--load_state = {folder}: state.json is not of format {FORMAT}; save the state again")
    digest = about.pop("digest", None)  # absent in states of before it was kept
    if digest is not None and digest != json_sha256(about):
        raise ConfigError(f"--load_state = {folder}: state.json is not the one that was saved; save the state again")
    for name in ("tokens_read", "batch_size"):
        entry(about, name, int, str(path), least=1, most=2**31)
    for name, kind in (("config", dict), ("dtypes", dict), ("params", str), ("arrays", str)):
        entry(about, name, kind, str(path))
    return about


def _check_shapes(
    folder: pathlib.Path, about: Mapping[str, Any], decoder: Decoder, arrays: Mapping[str, np.ndarray]
) -> None:
    """Raises ConfigError unless the arrays are a state of as many rows and tokens as state.json says."""
    rows, model = about["batch_size"], decoder.model
    small = named_arrays(jax.eval_shape(lambda: model.initial_state(rows, about["tokens_read"])))
    wanted = {name: leaf.shape for name, leaf in small.items()} | {"logits": (rows, model.vocab_size)}
    if wanted != {name: array.shape for name, array in arrays.items()}:
        raise ConfigError(f"--load_state = {folder}: its arrays are not those of this model; save it again")


def _read_arrays(folder: pathlib.Path, about: Any) -> dict[str, np.ndarray]:
    path = folder / "state.npz"
    if not path.is_file() or file_sha256(path) != about["arrays"]:
        raise ConfigError(f"--load_state = {folder}: state.npz is missing or not the one that was saved; save it again")
    arrays, dtypes = read_npz(path), about["dtypes"]
    for name, array in arrays.items():
        dtype = jnp.dtype(entry(dtypes, name, str, f"{path.with_suffix('.json')}: dtypes"))
        if dtype.itemsize != array.dtype.itemsize or dtype.hasobject:
            raise ConfigError(f"--load_state = {folder}: {name} is no {dtype}; save the state again")
        arrays[name] = array.view(dtype)
    return arrays


def _storable(array: np.ndarray) -> np.ndarray:
    """bfloat16, which npz does not know, as its bits."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
