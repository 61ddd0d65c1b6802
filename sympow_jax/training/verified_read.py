"""Reading a checkpoint: its arrays onto their devices, and the digests of what arrived."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sympow_jax.training.digests import digest_arrays
from sympow_jax.training.manifest import check_fits, fill, flatten, read_manifest, unflatten
from sympow_jax.training.stored_arrays import check_stored

_LEAST_GROUP, _GROUPS = 64 * 2**20, 16  # bytes; of larger states, each read fetches about a sixteenth


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: `tree` has the structure, dtypes and shardings of the `like` it was asked for."""

    step: int
    tree: dict[str, Any]
    metadata: dict[str, Any]


def read_verified(orbax: ocp.AsyncCheckpointer, folder: pathlib.Path, step: int, like: Mapping[str, Any]) -> Restored:
    """Reads a step into the structure of `like`; what does not fit, or is not what was saved, is an error."""
    wanted = flatten(like)
    error = None
    try:
        manifest = read_manifest(folder)
        saved = {name: e for name, e in manifest["arrays"].items() if name.split("/")[0] in like}
        check_fits(step, saved, wanted)
        check_stored(folder, wanted)
        arrays = _read_arrays(orbax, folder, wanted)
        digests = digest_arrays(arrays)
        bad = [name for name in saved if digests[name] != saved[name]["digest"]]
        if bad:
            raise ValueError(f"{len(bad)} of {len(saved)} arrays differ from what was saved, first {bad[0]}")
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        sound = multihost_utils.process_allgather(np.array(error is None))
        if error is None and not np.all(sound):
            error = ValueError("another process could not read it")
    if error is not None:
        raise error
    return Restored(step, fill(like, arrays), manifest["metadata"])


def _read_arrays(orbax: ocp.AsyncCheckpointer, folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    arrays = {}
    for names in _groups({name: leaf.size * leaf.dtype.itemsize for name, leaf in wanted.items()}):
        arrays |= _read_group(orbax, folder, {name: wanted[name] for name in names})
    return arrays


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names to be read together: Orbax may hold all that is on disk of a group in memory, beside what is read."""
    most, group, held = max(_LEAST_GROUP, sum(sizes.values()) // _GROUPS), [], 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _read_group(orbax: ocp.AsyncCheckpointer, folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    structs, args = {}, {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        structs[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        args[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    request = ocp.args.PyTreeRestore(item=unflatten(structs), restore_args=unflatten(args), partial_restore=True)
    state = orbax.restore(folder, args=ocp.args.Composite(state=request))["state"]
    return flatten(state)
