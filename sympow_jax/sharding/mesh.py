"""The mesh of devices, and what traced code asks of it.

    data    rows of the batch; parameters are whole on every device
    fsdp    rows of the batch; parameters and optimizer state are cut, and gathered where they are used
    tensor  heads and MLP features
    seq     the time dim: context parallelism

A model is traced inside `use_mesh`. Layers lay out activations with `constrain` and leave the rest to XLA, except
where tokens meet other tokens: there `over_shards` runs the same code as one device does, on each shard.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sympow_jax.typing import Array, PyTree

AXES = ("data", "fsdp", "tensor", "seq")
BATCH = ("data", "fsdp")  # the axes that rows of a batch are spread over


def infer_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of each axis, with the one that is -1 replaced by what the others leave of `num_devices`.

    Raises:
      ValueError: in one line, for two axes of -1, or sizes that do not fit the devices.
    """
    unknown = [axis for axis in AXES if sizes[axis] == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh.{unknown[1]} = -1: mesh.{unknown[0]} is -1 too; one axis is inferred, give the other")
    known = math.prod(sizes[axis] for axis in AXES if sizes[axis] != -1)
    if unknown and num_devices % known == 0:
        return {axis: num_devices // known if sizes[axis] == -1 else sizes[axis] for axis in AXES}
    product = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] != -1)
    if unknown:
        smaller = max(n for n in range(1, num_devices + 1) if num_devices % n == 0 and n <= known)
        raise ValueError(
            f"mesh: {product} = {known} does not divide the {num_devices} devices, so mesh.{unknown[0]} = -1 cannot be "
            f"inferred; a product of {smaller} would"
        )
    if known > num_devices:
        raise ValueError(
            f"mesh: {product} = {known} devices, and there are {num_devices}; use mesh.data = -1 or smaller axes"
        )
    return {axis: sizes[axis] for axis in AXES}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the four axes, over the first devices that the product of `sizes` (see `infer_sizes`) takes.

    `devices` are those of this run, or of a topology that is only compiled for.

    Raises:
      ValueError: in one line, TPU slices that `data` and `fsdp` cannot be spread over, or a part of one that is no box.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = infer_sizes(sizes, len(devices))
    used = devices[: math.prod(sizes.values())]
    shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(shape, used), AXES, axis_types=types)


def _arrange(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices as an array of `shape` whose neighbours are close on the network; slices lie along the batch."""
    if len(devices) == 1:  # nothing to arrange
        return np.asarray(devices, object).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":  # hosts of GPUs are in order already, the first axis across them
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except AssertionError:
            raise ValueError(
                f"mesh: the first {len(devices)} chips of the slice are not a box; use all of them (mesh.data = -1)"
            ) from None
    data = math.gcd(shape[0], slices)
    across = (data, slices // data, 1, 1)
    if shape[1] % across[1]:
        raise ValueError(
            f"mesh: data {shape[0]} x fsdp {shape[1]}: the {len(devices)} devices are {slices} slices, which only rows "
            f"of the batch can be spread over; use a multiple of {slices} for mesh.data, mesh.fsdp or their product"
        )
    inside = tuple(size // count for size, count in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Code traced inside sees `mesh`; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """The layout of what every device, and so every process, holds whole; None, any layout, without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def fetch(array: Array) -> np.ndarray:
    """The whole array in this process's memory; all processes that hold a part of it call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def shard_counts(mesh: Mesh | None) -> tuple[int, int]:
    """In how many parts a mesh cuts the rows of a batch, and its time dim."""
    return (1, 1) if mesh is None else (math.prod(mesh.shape[axis] for axis in BATCH), mesh.shape["seq"])


def row_blocks(mesh: Mesh) -> tuple[list[int], int]:
    """Which of the equal blocks of rows of a batch this process's devices hold, and how many blocks there are."""
    count = shard_counts(mesh)[0]
    where = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((count,))
    return sorted({index[0].start or 0 for index in where.values() if index}), count


def held_rows(mesh: Mesh | None, num_rows: int) -> np.ndarray:
    """Which of the rows of a batch this process's devices hold, [num_rows] bool; the last block may be short."""
    blocks, count = ([0], 1) if mesh is None else row_blocks(mesh)
    return np.isin(np.arange(num_rows) // max(1, -(-num_rows // count)), blocks)


def rows_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The layout of rows over data and fsdp; None, any layout, without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P(BATCH))


def place_rows(mesh: Mesh | None, rows: np.ndarray) -> Array | np.ndarray:
    """The array [B, ...] of all processes in `rows_sharding`, of which only `held_rows` are read here."""
    where = rows_sharding(mesh)
    return rows if where is None else jax.make_array_from_callback(rows.shape, where, rows.__getitem__)


def is_sharded() -> bool:
    """True where the code being traced will run on a mesh of several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


def axis_size(axis: str) -> int:
    """The size of a mesh axis in the code being traced; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def dividing(size: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """`axes` where they divide a dim of `size`, else None, whole on every device: as one prompt or one token is."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return None if size % math.prod(axis_size(name) for name in names) else axes


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Lays out the leading dims of x over the mesh axes that divide them, and the others whole; nothing without a mesh.

    What is trained is checked to divide before anything is compiled.
    """
    if not is_sharded():
        return x
    return jax.lax.with_sharding_constraint(
        x, P(*(dividing(n, names) for n, names in zip(x.shape, axes, strict=False)))
    )


def over_shards(function: Callable, arguments: Sequence[PyTree], specs: Sequence[PyTree], out_specs: PyTree) -> Any:
    """function(*arguments), on each device with its shards of them; it must itself combine what crosses shards.

    Gradients of an argument that several devices hold whole are summed over them.
    """
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)(*arguments)
