"""Reads the text of a compiled program: instructions, and how often each runs.

A compiler's own totals count the body of a loop once. Here every instruction carries the product of the trip counts
around it: from the compiler's `known_trip_count`, else from a scope `trips_N` that the library puts right around loops
whose bounds depend on data (`ops/loops.py`), else from the constant that the loop's condition compares with. A loop
without any of them is counted as one turn, and `unknown_loops` names it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "s4": 1, "u4": 1}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CONTINUED = re.compile(r'\n(?="|\}\})')  # splash attention's metadata stands on lines of its own in an instruction
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
FUSED = ("fusion", "async-start", "call", "async-done", "async-update")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dims, and whether it lives outside the device's main memory (TPU: VMEM)."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes in memory, padding of tiled layouts left out."""
        return self.size * BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shapes` has the elements of a tuple result, flattened."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    def called(self) -> list[str]:
        """Names of the computations that a fusion or call runs."""
        return _CALLED.findall(self.attributes)

    def branches(self) -> list[str]:
        """Names of the computations of which a conditional runs one."""
        named = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if named:
            return _NAME.findall(named.group(1))
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)

    @property
    def aliases(self) -> dict[int, int]:
        """Results of a fusion, by number, that are one of its operands, written in place or passed on."""
        found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", self.attributes)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", found.group(1)) if found else []
        return {int(result or 0): int(operand) for result, operand in pairs}

    @property
    def channel_of_pieces(self) -> str:
        """The channel of a TPU's collective that several fusions run a piece of, each beside a product; else ""."""
        channel = re.search(r"channel_id=(\d+)", self.attributes)
        return channel.group(1) if channel and '"async_collective_fusion_config"' in self.attributes else ""

    @property
    def body(self) -> str:
        """Name of the computation that a while repeats."""
        return self._attribute(r"body=%?([\w.\-]+)")

    @property
    def index(self) -> int:
        """Which element of a tuple is taken."""
        return int(self._attribute(r"index=(\d+)"))

    def _attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        assert found is not None, (pattern, self)
        return found.group(1)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, scope by scope."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def value(self) -> str:
        """The literal of a constant, the number of a parameter."""
        return self.attributes.split(")")[0]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """All computations of a module, by name, and which is the entry."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Computation, Instruction, float, bool]]:
        """(its computation, instruction, times it runs, whether it is inside a fusion) of the whole program."""
        yield from self._walk(self.entry, 1.0, False)

    def _walk(self, name: str, times: float, fused: bool) -> Iterator[tuple[Computation, Instruction, float, bool]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times, fused
            if instruction.opcode == "while":
                yield from self._walk(instruction.body, times * (self.trips(instruction) or 1.0), fused)
            elif instruction.opcode == "conditional":
                yield from self._walk(max(instruction.branches(), key=self.length), times, fused)
            elif instruction.opcode in FUSED:
                for called in instruction.called():
                    yield from self._walk(called, times, fused or instruction.opcode == "fusion")

    @functools.cache  # noqa: B019 (programs are few and short-lived)
    def length(self, name: str) -> int:
        """Instructions of a computation with all that it calls: the busier branch of a conditional has more."""
        total = 0
        for instruction in self.computations[name].values():
            inner = [instruction.body] if instruction.opcode == "while" else []
            total += 1 + sum(map(self.length, instruction.called() + inner))
        return total

    def trips(self, loop: Instruction) -> float | None:
        """How often the body of a `while` runs; None if nothing tells."""
        known = re.search(r'known_trip_count":?\s*\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return float(known.group(1))
        named = _expected_trips(loop)
        if named is not None:
            return named
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        assert condition is not None, loop
        limits = [
            int(i.value)
            for i in self.computations[condition.group(1)].values()
            if i.opcode == "constant" and i.value.isdigit()
        ]
        return float(max(limits)) if limits else None

    def unknown_loops(self) -> set[str]:
        """Names of the loops of which nothing tells how often they run; they are counted as one turn."""
        loops = (instruction for _, instruction, *_ in self.executed() if instruction.opcode == "while")
        return {loop.op_name or loop.name for loop in loops if self.trips(loop) is None}


def _expected_trips(loop: Instruction) -> float | None:
    """From the scope right around the loop; `_in_all` is over the turns of the loop whose scope is before it."""
    path = loop.op_name
    if not re.search(r"trips_[\d.]+(_in_all)?[)/]+while$", path):
        return None
    *outer, (trips, in_all) = re.findall(r"trips_([\d.]+)(_in_all)?[)/]+while", path)
    return float(trips) / (float(outer[-1][0]) if in_all and outer else 1.0)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in _CONTINUED.sub(" ", text).splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the compiler's text has no ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    shapes, rest = right[:end], right[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 2
    operands = tuple(_NAME.findall(rest[:end]))
    # a constant keeps its value and a parameter its number, which stand where operands are
    attributes = rest if opcode in ("constant", "parameter") else rest[end + 1 :]
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), opcode.strip(), _shapes(shapes), operands, attributes,
        left.startswith("ROOT "),
    )  # fmt: skip


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.end()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        on_chip = space is not None and space.group(1) not in ("0", "5")
        found.append(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), on_chip))
    return tuple(found)
