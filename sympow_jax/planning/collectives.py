"""What crosses between devices: the collectives of a compiled program by kind and mesh axis, and their time."""

import dataclasses
import math
import re

import numpy as np

from sympow_jax.planning.hlo import Computation, Instruction, Program
from sympow_jax.planning.targets import Target

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of the collectives of one kind along one axis in a step.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
      axis: the mesh axes whose devices take part, joined by +.
      group: devices that exchange with each other; those of the first group.
      count: how often they run in a step.
      bytes: what one device sends in a step: (n - 1)/n of the gathered, scattered or exchanged array, twice that for an
        all-reduce, the array for a permute.
      scope: where in the program, from the name of the operation.
    """

    kind: str
    axis: str
    group: tuple[int, ...]
    count: float
    bytes: float
    scope: str = ""


def collectives(program: Program, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every collective of the program that exchanges something, in the order of its text; one in pieces once."""
    found, begun = [], set()
    for computation, instruction, times, _ in program.executed():
        kind, channel = instruction.opcode.removesuffix("-start"), instruction.channel_of_pieces
        if kind not in KINDS or channel in begun:
            continue
        begun |= {channel} - {""}
        group = _group(instruction, math.prod(mesh_shape.values()))
        if len(group) < 2:
            continue
        found.append(
            Collective(
                kind,
                axes_of(group, mesh_shape),
                group,
                times,
                times * _sent(kind, computation, instruction, len(group)),
                instruction.op_name,
            )
        )
    return found


def summed(found: list[Collective]) -> list[Collective]:
    """One entry for each kind and axis, the largest first."""
    total: dict[tuple[str, str], Collective] = {}
    for c in found:
        old = total.get((c.kind, c.axis))
        total[c.kind, c.axis] = dataclasses.replace(
            c, count=c.count + (old.count if old else 0), bytes=c.bytes + (old.bytes if old else 0), scope=""
        )
    return sorted(total.values(), key=lambda c: -c.bytes)


def _sent(kind: str, computation: Computation, instruction: Instruction, n: int) -> float:
    """Bytes that one device sends in one run."""
    operands = [s for name in instruction.operands for s in computation[name].shapes] if instruction.operands else []
    given = float(sum(s.bytes for s in operands))
    return {
        "all-gather": (n - 1) * given,
        "all-reduce": 2 * (n - 1) / n * given,
        "collective-permute": given,
    }.get(kind, (n - 1) / n * given)


def _group(instruction: Instruction, num_devices: int) -> tuple[int, ...]:
    """Logical ids of the devices that exchange with each other: the first group, or the first pair of a permute."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        ids = re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))
        return next(((int(a), int(b)) for a, b in ids if a != b), ())
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return tuple(int(i) for i in listed.group(1).split(","))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        groups, size, dims, order = tiled.groups()
        ids = np.arange(num_devices).reshape([int(d) for d in dims.split(",")])
        ids = ids.transpose([int(d) for d in order.split(",")]) if order else ids
        return tuple(int(i) for i in ids.reshape(int(groups), int(size))[0])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]*)\))? \{([^}]*)\}", text)
    if named:
        return _mesh_group(named.group(1), named.group(3), num_devices)
    return tuple(range(num_devices))


def _mesh_group(mesh: str, axes: str, num_devices: int) -> tuple[int, ...]:
    """mesh['a'=8,'b'=2] {'a'}: the devices that differ in the named axes only."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    ids = np.arange(num_devices).reshape(list(sizes.values()))
    named = re.findall(r"'(\w+)'", axes)
    index = tuple(slice(None) if name in named else 0 for name in sizes)
    return tuple(int(i) for i in np.ravel(ids[index]))


def axes_of(group: tuple[int, ...], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by +."""
    coordinates = np.array(np.unravel_index(np.asarray(group), tuple(mesh_shape.values())))
    varies = (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(name for name, differs in zip(mesh_shape, varies, strict=True) if differs)


def bandwidth(group: tuple[int, ...], target: Target, devices: list) -> float:
    """Bytes/s that one device can send to a group, at best.

    On a torus: the links of the dims that the group spans, both ways around a whole ring and one way along a line or a
    part of a ring, whose other links belong to other groups. On GPUs:
    NVLink inside a host, the network cards as soon as the group spans hosts.
    """
    device = target.device
    members = [devices[i] for i in group]
    if device.torus_dims == 0:
        hosts = {d.process_index for d in members}
        return device.link_bandwidth if len(hosts) == 1 else device.host_bandwidth
    coordinates = np.array([d.coords[: device.torus_dims] for d in members])
    places = [len(set(coordinates[:, axis])) for axis in range(device.torus_dims)]
    rings = [size == count and size % device.wraps_at == 0 for size, count in zip(target.shape, places, strict=True)]
    ways = sum(2 if ring else 1 for ring, count in zip(rings, places, strict=True) if count > 1)
    return device.link_bandwidth * max(ways, 1)


def network_seconds(found: list[Collective], target: Target, devices: list) -> float:
    """Time of all exchanges of a step, one after the other and each at its best bandwidth."""
    return sum(c.bytes / bandwidth(c.group, target, devices) for c in found)
