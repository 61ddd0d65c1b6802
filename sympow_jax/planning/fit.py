"""Looks for settings under which a config fits a target, and ranks them by the least time of a step."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sympow_jax import config as config_lib
from sympow_jax.config import Config, ConfigError, MeshConfig, linear_specs
from sympow_jax.models.model import resolve_implementation
from sympow_jax.planning.compile import build
from sympow_jax.planning.errors import PlanError
from sympow_jax.planning.report import Plan, failure, plan
from sympow_jax.planning.schedules import schedule
from sympow_jax.planning.targets import Target
from sympow_jax.training.config_mesh import config_mesh

Changes = dict[str, Any]
# How much of a layer's activations each policy keeps, roughly: the order in which settings are tried, nothing more.
KEPT = {"none": 1.0, "dots": 0.5, "attention": 0.25, "block": 0.125}
_NOTHING: Changes = {}


def meshes(config: Config, num_devices: int, fixed: Mapping[str, Any] = _NOTHING) -> list[Changes]:
    """Meshes over all devices that have the sizes in `fixed`, the ones that communicate least first.

    Rows of the batch go to `data`, or to `fsdp`, which costs gathers of the parameters; what is left is cut along the
    sequence, or over the heads: heads first for a linear kernel in a quadratic form, whose state is too large to pass.
    """
    quadratic = linear_specs(config) and not resolve_implementation(config).attention.is_linear_form
    avoided = "mesh.seq" if quadratic else "mesh.tensor"
    rows = config.data.batch_size
    found = []
    sizes = [_choices(axis, _powers(num_devices), fixed) for axis in ("mesh.seq", "mesh.tensor")]
    for seq, tensor in itertools.product(*sizes):
        batch, rest = divmod(num_devices, seq * tensor)
        if rest or batch == 0 or rows % batch:
            continue
        for data, fsdp in _splits(batch, fixed.get("mesh.data", 0), fixed.get("mesh.fsdp", 0)):
            found.append({"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "mesh.seq": seq})
    return sorted(found, key=lambda m: (m["mesh.seq"] * m["mesh.tensor"], m[avoided], m["mesh.fsdp"]))


def _splits(batch: int, data: int, fsdp: int) -> list[tuple[int, int]]:
    """Sizes of `data` and `fsdp`, given or 0: one of them has all devices unless the other has a size."""
    if data or fsdp:
        data, fsdp = data or batch // fsdp, fsdp or batch // data
        return [(data, fsdp)] if data * fsdp == batch else []
    return [(batch, 1), (1, batch)] if batch > 1 else [(1, 1)]


def _choices(key: str, values: Collection[Any], fixed: Mapping[str, Any]) -> Collection[Any]:
    return [fixed[key]] if key in fixed else values


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def candidates(config: Config, target: Target, fixed: Mapping[str, Any] = _NOTHING) -> Iterator[list[Changes]]:
    """For each mesh that the config allows, remat policies and accumulation from the most memory to the least.

    All of them have the values in `fixed`.
    """
    for mesh in meshes(config, len(target.devices), fixed):
        rows = config.data.batch_size // (mesh["mesh.data"] * mesh["mesh.fsdp"])
        remats = _choices("model.remat", KEPT, fixed)
        accumulated = _choices("optimizer.accumulation_steps", _powers(rows), fixed)
        steps = itertools.product(remats, accumulated)
        ladder = []
        for remat, parts in sorted(steps, key=lambda step: (-KEPT.get(step[0], 0.0) / step[1], step[1])):
            changes = {**mesh, "model.remat": remat, "optimizer.accumulation_steps": parts}
            if _legal(config, changes, target):
                ladder.append(changes)
        if ladder:
            yield ladder


def _legal(config: Config, changes: Changes, target: Target) -> bool:
    try:
        config_mesh(config_lib.override(config, changes), target.devices)
    except ConfigError:
        return False
    return True


def search(
    config: Config,
    vocab_size: int,
    target: Target,
    *,
    max_compiles: int,
    tell: Callable[[str], None],
    folder: pathlib.Path | None = None,
    given: Collection[str] = (),
    kernels: bool = False,
) -> list[tuple[Changes, Plan]]:
    """Compiles up to max_compiles candidates; returns those that fit, the fastest at best first.

    Memory falls along the ladder of a mesh, so that halving it finds the first setting that fits, the one that
    recomputes least. Once something fits, two compiles are kept back to try the fastest with half and twice the chunk
    size. Settings whose keys are in `given` stay as they are, axes of -1 aside; with `kernels` their schedules count.
    """
    fixed = {key: value for key, value in config_lib.flatten(config).items() if key in given and value != -1}
    fitting: list[tuple[Changes, Plan]] = []
    compiled = 0

    def fits(changes: Changes) -> bool:
        nonlocal compiled
        compiled += 1
        result = try_plan(config_lib.override(config, changes), vocab_size, target, folder, kernels=kernels)
        tell(f"{compiled}/{max_compiles} {flags(config, changes) or 'as configured'}: {_summary(result)}")
        if result["status"] == "fits":
            fitting.append((changes, result))
        return result["status"] == "fits"

    chunk = config.attention.chunk_size if linear_specs(config) and "attention.chunk_size" not in fixed else 0
    sizes = ((chunk // 2, 2 * chunk) if chunk > 1 else ())[: max_compiles - 1]
    for ladder in candidates(config, target, fixed):
        low, high = 0, len(ladder)  # ladder[high] is known to fit
        while low < high and compiled < max_compiles - (len(sizes) if fitting else 0):
            middle = (low + high) // 2
            low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)
    best = min(fitting, key=_step_seconds)[0] if fitting else {}
    for size in sizes[: max_compiles - compiled] if fitting else ():
        fits(best | {"attention.chunk_size": size})
    return sorted(fitting, key=_step_seconds)


def _step_seconds(found: tuple[Changes, Plan]) -> float:
    return found[1]["roofline"]["step_seconds"]


def with_default_mesh(config: Config, target: Target) -> Config:
    """A config that asks for no mesh, on the one that communicates least if there is one; else the config as it is."""
    asked = dataclasses.replace(config.mesh, cpu_devices=-1)
    if asked != MeshConfig(data=-1, fsdp=1, tensor=1, seq=1, cpu_devices=-1):
        return config
    for ladder in candidates(config, target):
        return config_lib.override(config, {key: ladder[0][key] for key in ladder[0] if key.startswith("mesh.")})
    return config


def try_plan(
    config: Config, vocab_size: int, target: Target, folder: pathlib.Path | None = None, *, kernels: bool = False
) -> Plan:
    """Builds and reports, with the schedules of kernels if asked; what the compiler refuses becomes a plan as well."""
    try:
        built = build(config, vocab_size, target, folder)
        return plan(built, target, functools.partial(schedule, target=target, folder=folder) if kernels else None)
    except PlanError as error:
        return failure(config, target, error)


def _summary(result: Plan) -> str:
    if result["status"] != "fits":
        return result["status"]
    return f"fits, {result['roofline']['step_seconds']:.3g} s a step at best"


def flags(config: Config, changes: Changes) -> str:
    """The command-line flags that turn `config` into the found one."""
    known = config_lib.flatten(config)
    return " ".join(f"--config.{key}={value}" for key, value in changes.items() if known[key] != value)
