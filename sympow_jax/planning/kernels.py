"""The Pallas kernels of a program: compilers see a call without knowing what is in it, so their authors tell."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from sympow_jax.planning.hlo import Computation, Instruction, Program, Shape

TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, as it was traced.

    Attributes:
      name: its author's.
      results: the dims of each array that it makes.
      steps: of its grid; 0 if they depend on data.
      flops, bytes: by its author's cost estimate, of one call; None without one.
      even: whether every step of the grid does the same products, none of them in a branch or a loop.
    """

    name: str
    results: tuple[tuple[int, ...], ...]
    steps: int
    flops: float | None
    bytes: float | None
    even: bool

    def is_called_by(self, instruction: Instruction) -> bool:
        """Whether an instruction of the compiled program is a call of this kernel."""
        same = tuple(shape.dims for shape in instruction.shapes) == self.results
        return same and re.search(rf"\b{re.escape(self.name)}\b", instruction.op_name) is not None


def traced_kernels(jaxpr: Any) -> tuple[Kernel, ...]:
    """All different kernels of a traced function."""
    found = (_kernel(equation) for equation in _equations(jaxpr) if equation.primitive.name == "pallas_call")
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel of a compiled program, in all places that call it with the same arguments.

    Attributes:
      name: the kernel's.
      kernel: as it was traced; None if the program has one that was not.
      times: how often it runs.
      operands, results: its arrays.
      config: what the compiler of the kernel is given.
      vmem_bytes: on-chip memory that it holds, where the compiler says so.
    """

    name: str
    kernel: Kernel | None
    times: float
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    config: str
    vmem_bytes: int


def calls(program: Program, kernels: Iterable[Kernel]) -> list[Call]:
    """All different calls of kernels, in the order of the program."""
    found: dict[tuple, Call] = {}
    for computation, instruction, times, _ in program.executed():
        if is_kernel(instruction):
            call = _call(computation, instruction, times, find(kernels, instruction))
            key = call.name, call.operands, call.results
            old = found.get(key)
            found[key] = dataclasses.replace(call, times=times + old.times) if old else call
    return list(found.values())


def _call(computation: Computation, instruction: Instruction, times: float, kernel: Kernel | None) -> Call:
    operands = tuple(s for name in instruction.operands for s in computation[name].shapes)
    config = re.search(r"backend_config=(\{.*\})", instruction.attributes)
    used = re.search(r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', instruction.attributes)
    name = kernel.name if kernel else instruction.op_name.removesuffix("/pallas_call").rpartition("/")[2]
    results = instruction.shapes
    operands, results = (tuple(dataclasses.replace(s, on_chip=False) for s in x) for x in (operands, results))
    given, held = config.group(1) if config else "", int(used.group(1)) if used else 0
    return Call(name, kernel, times, operands, results, given, held)


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction of a compiled program calls a kernel."""
    return instruction.opcode == "custom-call" and any(f'"{name}"' in instruction.attributes for name in TARGETS)


def find(kernels: Iterable[Kernel], instruction: Instruction) -> Kernel | None:
    """The kernel that an instruction calls, if it is among them."""
    return next((kernel for kernel in kernels if kernel.is_called_by(instruction)), None)


def _kernel(equation: Any) -> Kernel:
    params = equation.params
    cost, grid = params["cost_estimate"], params["grid_mapping"].grid
    return Kernel(
        params["name"] or "pallas_call",
        tuple(tuple(v.aval.shape) for v in equation.outvars),
        math.prod(grid) if all(isinstance(size, int) for size in grid) else 0,
        None if cost is None else float(cost.flops),
        None if cost is None else float(cost.bytes_accessed),
        not any(
            inner.primitive.name == "dot_general"
            for outer in params["jaxpr"].eqns
            for sub in _inside(outer)
            for inner in _equations(sub)
        ),
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all inside it, but not of its kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in _inside(equation):
                yield from _equations(inner)


def _inside(equation: Any) -> list[Any]:
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns")]
