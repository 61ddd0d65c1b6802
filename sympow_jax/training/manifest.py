"""What a checkpoint says about itself: the manifest, and the names of the arrays of a nested dict."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.config import RunError
from sympow_jax.files import FileError, entry, inside, json_sha256, read_json, write_text_atomic
from sympow_jax.training.digests import digest_arrays

FORMAT = 1


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the message is one line for each step tried."""


class CheckpointMismatchError(CheckpointError):
    """A sound checkpoint does not fit what was asked for: another shape, dtype or set of arrays."""


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Manifest of the step saved in `folder`; raises when it is missing or damaged."""
    manifest = read_json(inside(folder.parent, f"{folder.name}/manifest/metadata"), allow_nan=True)
    digest = manifest.pop("digest", None)
    if digest != json_sha256(manifest) or manifest.get("step") != int(folder.name):
        raise ValueError("the manifest differs from what was saved")
    if manifest.get("format") != FORMAT:
        raise CheckpointMismatchError(
            f"checkpoint {folder} has format {manifest.get('format')}, this version reads {FORMAT}"
        )
    for name in ("arrays", "metadata", "metrics"):
        entry(manifest, name, dict, "the manifest")
    for name, array in manifest["arrays"].items():
        shape = entry(array, "shape", list, name) if isinstance(array, dict) else None
        if shape is None or not all(type(size) is int and 0 < size < 2**40 for size in shape):
            raise FileError(f"the manifest: {name} has no shape of positive whole numbers")
        jnp.dtype(entry(array, "dtype", str, name))
        entry(array, "digest", str, name)
    return manifest


def make_manifest(
    step: int, arrays: Mapping[str, Any], metadata: Mapping[str, Any], metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    """The manifest of a step, JSON; computes the digests, so every process must call it."""
    digests = digest_arrays(arrays)
    manifest = {
        "format": FORMAT,
        "step": step,
        "metadata": dict(metadata),
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "arrays": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "digest": digests[name]}
            for name, array in arrays.items()
        },
    }
    return _digested(manifest)


def add_to_manifest(folder: pathlib.Path, metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Adds to what the manifest of a step on disk says; the file is replaced whole."""
    manifest = read_manifest(folder)
    for name, more in (("metadata", metadata), ("metrics", metrics)):
        manifest[name] = manifest[name] | dict(more)
    write_text_atomic(folder / "manifest" / "metadata", json.dumps(_digested(manifest)))


def _digested(manifest: dict[str, Any]) -> dict[str, Any]:
    manifest = json.loads(json.dumps(manifest))
    return manifest | {"digest": json_sha256(manifest)}


def check_fits(step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointMismatchError unless the saved arrays have exactly the wanted names, shapes and dtypes."""
    where = f"checkpoint step {step}"
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointMismatchError(
                f"{where} has no array {name}, which this model needs; use the config it was saved with"
            )
        shape, dtype = tuple(saved[name]["shape"]), saved[name]["dtype"]
        if shape != tuple(leaf.shape) or dtype != str(leaf.dtype):
            raise CheckpointMismatchError(
                f"{where}: {name} was saved as {dtype}{list(shape)} and is wanted as"
                f" {leaf.dtype}{list(leaf.shape)}; use the config it was saved with"
            )
    extra = sorted(saved.keys() - wanted.keys())
    if extra:
        raise CheckpointMismatchError(
            f"{where} has {len(extra)} arrays that this model lacks, first {extra[0]}; use the config it was saved with"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"params/embedding/table": array}; empty dicts vanish."""
    flat = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f"{prefix}{key!r} is not a plain name; keys of a checkpoint are strings without a slash")
        name = prefix + key
        if isinstance(value, Mapping):
            flat |= flatten(value, name + "/")
        elif not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name} is {type(value).__name__}; a checkpoint holds dicts of arrays (jax.random.key_data for keys)"
            )
        elif math.prod(value.shape) == 0:
            raise TypeError(
                f"{name} has shape {tuple(value.shape)}; arrays without elements cannot be saved, leave it out"
            )
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def fill(like: Mapping[str, Any], arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The structure of `like`, empty dicts included, with the arrays of a flat dict."""
    return {
        key: fill(value, arrays, f"{prefix}{key}/") if isinstance(value, Mapping) else arrays[prefix + key]
        for key, value in like.items()
    }


def one_line(error: BaseException) -> str:
    """Type and message; of a long one the beginning, which says what was tried, and the end, which says why not."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-240:]}"
