"""The mesh of an evaluation or a generation: the one asked for, the run's, or what the devices at hand allow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import Config, ConfigError
from sympow_jax.training.config_mesh import check_model, make_mesh, mesh_sizes
from sympow_jax.training.screen import mesh_line


def evaluation_mesh(config: Config, asked: Mapping[str, int], *, rows: int = 0) -> Mesh:
    """Where a trained model is measured, of `evaluation_sizes`; the numbers do not depend on it."""
    devices = jax.devices()
    return make_mesh(evaluation_sizes(config, asked, devices, rows=rows), devices)


def evaluation_sizes(
    config: Config, asked: Mapping[str, int], devices: Sequence[Any], *, rows: int = 0
) -> dict[str, int]:
    """The sizes of the axes of an evaluation's mesh.

    Without `asked` it is the run's mesh, or, where that does not fit the devices, the run's with `data` as they allow,
    or all of them along `data`.

    Args:
      config: of the run.
      asked: sizes by axis, a whole mesh: an axis left out is 1, and data what the others leave. {} for none.
      devices: of this run.
      rows: of every call, which are not padded; where no mesh was asked for, one process leaves devices unused that
        would repeat the work of others. 0 for any number.

    Raises:
      ConfigError: in one line, the sizes asked for do not fit the devices or the model.
    """
    if asked:
        return _fitting(config, {**_ALONG_DATA, **asked}, devices)
    run = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    sizes = None
    for wanted in (run, run | {"data": -1}):
        try:
            sizes = _fitting(config, wanted, devices)
            break
        except ConfigError:
            continue
    sizes = sizes or _fitting(config, _ALONG_DATA, devices)
    if rows and len({device.process_index for device in devices}) == 1:
        blocks, rest = divmod(rows, sizes["fsdp"])
        sizes["data"] = 1 if rest else math.gcd(sizes["data"], blocks)
    return sizes


_ALONG_DATA = {"data": -1, "fsdp": 1, "tensor": 1, "seq": 1}


def _fitting(config: Config, wanted: Mapping[str, int], devices: Sequence[Any]) -> dict[str, int]:
    sizes = mesh_sizes(wanted, devices)
    check_model(config, sizes)
    return sizes


def lost_axes(config: Config, mesh: Mesh) -> dict[str, int]:
    """The axes along which the run cut its model, by size, where the mesh has not all of them; {} where it has."""
    run = {axis: getattr(config.mesh, axis) for axis in sharding.AXES if axis != "data"}
    cut = {axis: size for axis, size in run.items() if size > 1}
    return {} if all(mesh.shape[axis] == size for axis, size in cut.items()) else cut


def mesh_note(config: Config, mesh: Mesh, asked: Mapping[str, int]) -> str:
    """What the screen says of the mesh, and of the run's where another one had to do."""
    note, lost = f"mesh: {mesh_line(mesh)}", lost_axes(config, mesh)
    if asked or not lost:
        return note
    trained = " x ".join(f"{axis} {size}" for axis, size in lost.items())
    return f"{note}; the run's {trained} does not fit what is here"
