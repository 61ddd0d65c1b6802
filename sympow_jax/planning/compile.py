"""Compiles the train step and the eval step of a config, sharded as configured, for a target."""

import dataclasses
import pathlib
import re
from typing import Any

import jax

from sympow_jax.config import Config, ConfigError
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.ops.platform import compiling_for
from sympow_jax.planning.errors import PlanError
from sympow_jax.planning.kernels import Kernel, traced_kernels
from sympow_jax.planning.programs import compile_lowered
from sympow_jax.planning.targets import GIB, Target, mismatch
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.data import abstract_batch
from sympow_jax.training.step import make_eval_step, make_train_step
from sympow_jax.training.train_state import abstract_train_state
from sympow_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs.

    Attributes:
      parameters, optimizer, batch: arguments of the step; batch includes its counters.
      temporaries: activations, gradients, and what the compiler keeps besides; with results that are new arrays.
      capacity: what the device lets a program use.
    """

    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    capacity: float

    @property
    def total(self) -> float:
        """The peak."""
        return self.parameters + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the peak stays below the capacity."""
        return self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled program.

    Attributes:
      text: the optimised HLO.
      memory: by the compiler's own account.
      compiler_flops: likewise, with loop bodies once.
      seconds: that compiling took.
      kernels: those that it calls.
    """

    text: str
    memory: Memory
    compiler_flops: float
    seconds: float
    kernels: tuple[Kernel, ...] = ()


@dataclasses.dataclass(frozen=True)
class Built:
    """Both programs of a config on a target, and the mesh and parameters that they were built with."""

    config: Config
    mesh: Any
    params: PyTree
    train: Step
    evaluation: Step


def build(config: Config, vocab_size: int, target: Target, folder: pathlib.Path | None = None) -> Built:
    """Compiles both steps; a folder keeps what was compiled, see `programs.py`.

    Raises:
      ConfigError: a mesh that does not fit the devices or the shapes.
      PlanError: what the compiler refuses, as one line with the cause and the knobs.
    """
    with compiling_for(target.platform):
        config = resolve_implementation(config)
    mesh = config_mesh(config, target.devices)
    try:
        with compiling_for(target.platform):
            return _build(config, vocab_size, target, mesh, folder)
    except (ConfigError, PlanError):
        raise
    except Exception as error:  # the compilers' errors have no common type
        raise explain(str(error), config, target) from error


def _build(config: Config, vocab_size: int, target: Target, mesh: Any, folder: pathlib.Path | None) -> Built:
    model = Model(config, vocab_size, mesh)
    state, batch = abstract_train_state(model), abstract_batch(config, mesh)
    train = _compile(make_train_step(model), (state, batch), (state.params, state.opt_state), target, folder)
    evaluation = _compile(make_eval_step(model), (state.params, batch), (state.params, ()), target, folder)
    return Built(config, mesh, state.params, train, evaluation)


def _compile(
    function: Any, arguments: tuple, kept: tuple[PyTree, PyTree], target: Target, folder: pathlib.Path | None
) -> Step:
    traced = function.trace(*arguments)
    compiled = compile_lowered(traced.lower(), target, folder)
    parameters, optimizer = (device_bytes(tree) for tree in kept)
    batch = compiled.argument_bytes - parameters - optimizer
    memory = Memory(parameters, optimizer, batch, compiled.other_bytes, target.capacity)
    return Step(compiled.text, memory, compiled.flops, compiled.seconds, traced_kernels(traced.jaxpr))


def device_bytes(tree: PyTree) -> float:
    """Bytes that one device holds of a tree of sharded shapes."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total


_OUT_OF_MEMORY = (
    re.compile(r"required for [\w ]+\(([\d.]+)([KMGT])?i?B?\) exceeds available \w+ \(([\d.]+)([KMGT])?"),
    re.compile(r"Used ([\d.]+)([KMGT])? of ([\d.]+)([KMGT])?"),
    re.compile(r", ([\d.]+)([KMGT])? exceeds ([\d.]+)([KMGT])?"),
)
_UNITS = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def explain(text: str, config: Config, target: Target) -> PlanError:
    """A compiler's message as one line: the cause, and the settings that change it."""
    line = " ".join(text.split())
    where = f"{config.variant} for {target.name}"
    if "vmem" in line.lower() and ("exhausted" in line.lower() or "out of memory" in line.lower()):
        return PlanError(
            "kernel", f"{where}: a kernel needs more on-chip memory (VMEM) than there is; use a smaller "
            f"attention.chunk_size (now {config.attention.chunk_size}): {line[:160]}"
        )  # fmt: skip
    if "Mosaic" in line or "Pallas" in line:
        return PlanError(
            "kernel", f"{where}: the kernel compiler refuses a kernel; use attention.implementation = "
            f"{'chunked' if config.attention.implementation == 'pallas' else 'blockwise'!r}: {line[:200]}"
        )  # fmt: skip
    if "RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower():
        return PlanError("memory", f"{where}: {_memory_text(line)}; {memory_knobs(config, target)}")
    cause = mismatch(target.platform)
    if cause and "INTERNAL" in line:
        return PlanError("compiler", f"{where}: {cause}; {line[:300]}")
    if "harding" in line or "divisible" in line or "partition" in line.lower():
        return PlanError(
            "sharding", f"{where}: the compiler cannot lay the program out on this mesh; change mesh.data, mesh.fsdp, "
            f"mesh.tensor or mesh.seq: {line[:200]}"
        )  # fmt: skip
    return PlanError("compiler", f"{where}: {line[:300]}")


def _memory_text(line: str) -> str:
    for pattern in _OUT_OF_MEMORY:
        match = pattern.search(line)
        if match:
            needed, limit = (float(match.group(i)) * _UNITS[match.group(i + 1)] / GIB for i in (1, 3))
            return f"needs {needed:.2f} GiB of {limit:.2f} GiB of device memory, {needed - limit:.2f} GiB too much"
    return f"out of device memory: {line[:160]}"


def memory_knobs(config: Config, target: Target) -> str:
    """The settings that would save memory, the cheapest in time first."""
    d, o, mesh = config.data, config.optimizer, config.mesh
    devices = len(target.devices)
    knobs = []
    if config.model.remat == "none":
        knobs.append("--config.model.remat=block")
    rows = d.batch_size // o.accumulation_steps
    if rows % 2 == 0 and rows >= 2 * max(devices // max(mesh.seq * mesh.tensor, 1), 1):
        knobs.append(f"--config.optimizer.accumulation_steps={2 * o.accumulation_steps}")
    if mesh.fsdp == 1 and devices > 1:
        knobs.append(f"--config.mesh.fsdp={devices // max(mesh.seq * mesh.tensor, 1)} --config.mesh.data=1")
    if mesh.seq < devices:
        knobs.append(f"a larger mesh.seq (now {mesh.seq})")
    knobs.append("a larger slice, or --fit to search")
    return "try " + ", or ".join(knobs)
