"""Bytes that one device reads and writes in its main memory: the arguments and results of every kernel.

What a TPU program keeps in VMEM the compiler's text says. A GPU's L2 cache is modelled, so that its memory time is a
bound: it holds whole arrays, and those not used for longest leave first. An array in it is read for nothing; what was
written costs its bytes when it leaves while something still needs it. Arrays that nothing needs leave at once, at no
cost. Real caches hold less: they keep lines of dead arrays, have sets, and on some devices two halves. A loop is
followed for two turns, of which the second stands for all others.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence

from sympow_jax.planning.hlo import Computation, Instruction, Program
from sympow_jax.planning.kernels import Kernel, find

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "domain",
}  # fmt: skip
_READS_PART = ("dynamic-slice", "slice", "gather")
_NEVER = math.inf


@dataclasses.dataclass(frozen=True)
class Use:
    """Bytes that an instruction touches of one of its operands or results, by number."""

    number: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Uses:
    """What an instruction reads of its operands and writes of its results; results that are operands, updated."""

    read: tuple[Use, ...]
    written: tuple[Use, ...]
    updated: tuple[tuple[int, int], ...] = ()
    more: float = 0.0


def memory_bytes(program: Program, kernels: Sequence[Kernel] = (), cache_bytes: float = 0.0) -> float:
    """Bytes of the whole program; kernels tell their own where they read more than their arguments once."""
    walk = _Walk(program, kernels, _Cache(cache_bytes))
    entry = program.computations[program.entry]
    total, _ = walk.computation(entry, {}, set())
    return total + walk.cache.flush()


class _Cache:
    """Arrays by number, in the order of their last use; `write` and `read` return what passes through memory."""

    def __init__(self, capacity: float):
        self.capacity, self.used = capacity, 0.0
        self.entries: dict[object, tuple[float, float]] = {}  # size, and bytes that memory has yet to get

    def read(self, key: int, part: object, touched: float, size: float) -> float:
        """`part` names what is touched where it is less than the array."""
        for held in (key, (key, part)):
            if held in self.entries:
                self._put(held, self.entries[held][0], 0.0)
                return 0.0
        whole = touched >= size
        return touched + self._put(key if whole else (key, part), size if whole else touched, 0.0)

    def write(self, key: int, touched: float, size: float) -> float:
        """An array that fits is held whole once a part of it is written; memory has yet to get the part."""
        if size > self.capacity:
            return touched
        return self._put(key, size, touched)

    def drop(self, key: int) -> None:
        """The array is needed no longer."""
        for held in [k for k in self.entries if k == key or (isinstance(k, tuple) and k[0] == key)]:
            self.used -= self.entries.pop(held)[0]

    def flush(self) -> float:
        """All that memory has yet to get."""
        left = sum(dirty for _, dirty in self.entries.values())
        self.entries.clear()
        return left

    def _put(self, key: object, size: float, written: float) -> float:
        if size > self.capacity:
            return 0.0
        old, dirty = self.entries.pop(key, (0.0, 0.0))
        self.entries[key] = size, min(dirty + written, size)
        self.used += size - old
        cost = 0.0
        while self.used > self.capacity:
            oldest = next(iter(self.entries))
            left, unsaved = self.entries.pop(oldest)
            self.used -= left
            cost += unsaved
        return cost


class _Walk:
    """Follows a program in the order of its schedule. Arrays have numbers, which aliases share."""

    def __init__(self, program: Program, kernels: Sequence[Kernel], cache: _Cache):
        self.program, self.kernels, self.cache = program, kernels, cache
        self.arrays = 0
        self.known: dict[int, Uses] = {}

    def new(self) -> int:
        """The number of a new array."""
        self.arrays += 1
        return self.arrays

    def computation(
        self, computation: Computation, given: dict[int, tuple[int, ...]], owned: set[int]
    ) -> tuple[float, tuple[int, ...]]:
        """(bytes, arrays of the root) of one run on the arrays of its parameters; it may end those it owns."""
        total, turn = 0.0, object()
        values: dict[str, tuple[int, ...]] = {}
        last_use = _last_uses(computation)
        ends: dict[int, float] = {}
        root: tuple[int, ...] = ()
        for at, instruction in enumerate(computation.values()):
            operands = [values.get(name, ()) for name in instruction.operands]
            dying = {a for arrays in operands for a in arrays if ends.get(a) == at}
            if instruction.opcode == "parameter":
                found = given.get(int(instruction.value)) or tuple(self.new() for _ in instruction.shapes)
            else:
                cost, found = self._instruction(computation, instruction, operands, dying, turn)
                total += cost
            values[instruction.name] = found
            root = found if instruction.is_root else root
            mine = owned if instruction.opcode == "parameter" and given else None
            for array in found:
                end = last_use.get(instruction.name, at) if mine is None or array in mine else _NEVER
                ends[array] = max(ends.get(array, 0), _NEVER if instruction.is_root else end)
            for array in dying | set(found):
                if ends[array] == at:
                    self.cache.drop(array)
        return total, root

    def _instruction(
        self, computation: Computation, instruction: Instruction, operands: list, dying: set[int], turn: object
    ) -> tuple[float, tuple[int, ...]]:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(instruction, operands[0], dying)
        if opcode in ("conditional", "call"):
            if opcode == "call":
                name, passed = instruction.called()[0], operands
            else:
                branches = instruction.branches()
                name = max(branches, key=self.program.length)
                passed = [operands[1 + branches.index(name)]]
            return self.computation(self.program.computations[name], dict(enumerate(passed)), dying)
        if opcode == "tuple":
            return 0.0, tuple(a for arrays in operands for a in arrays)
        if opcode == "get-tuple-element":
            number = instruction.index
            source = operands[0]
            return 0.0, (source[number],) if number < len(source) else (self.new(),)
        if opcode in _FREE:
            same = bool(operands) and len(operands[0]) == len(instruction.shapes)
            return 0.0, operands[0] if same else tuple(self.new() for _ in instruction.shapes)
        return self._kernel(computation, instruction, operands, turn)

    def _loop(self, loop: Instruction, carried: tuple[int, ...], dying: set[int]) -> tuple[float, tuple[int, ...]]:
        body = self.program.computations[loop.body]
        kept = set(carried) - dying
        trips = self.program.trips(loop)
        trips = 1.0 if trips is None else trips
        first, carried = self.computation(body, {0: carried}, dying)
        if trips <= 1.0:
            return trips * first, carried
        others, carried = self.computation(body, {0: carried}, set(carried) - kept)
        return first + (trips - 1.0) * others, carried

    def _kernel(
        self, computation: Computation, instruction: Instruction, operands: list, turn: object
    ) -> tuple[float, tuple[int, ...]]:
        uses = self.known.get(id(instruction))
        if uses is None:
            uses = self.known[id(instruction)] = self._uses(computation, instruction)
        total = uses.more
        for use in uses.read:
            arrays, shapes = operands[use.number], computation[instruction.operands[use.number]].shapes
            for array, shape in zip(arrays, shapes, strict=False):
                touched = min(use.bytes, shape.bytes)
                total += 0.0 if shape.on_chip else self.cache.read(array, turn, touched, shape.bytes)
        updated = dict(uses.updated)
        found = tuple(
            operands[updated[n]][0] if n in updated and operands[updated[n]] else self.new()
            for n in range(len(instruction.shapes))
        )
        for use in uses.written:
            shape = instruction.shapes[use.number]
            total += 0.0 if shape.on_chip else self.cache.write(found[use.number], use.bytes, shape.bytes)
        return total, found

    def _uses(self, computation: Computation, instruction: Instruction) -> Uses:
        written = tuple(Use(n, shape.bytes) for n, shape in enumerate(instruction.shapes))
        if instruction.opcode in _READS_PART:
            return Uses((Use(0, sum(shape.bytes for shape in instruction.shapes)),), written)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            number = 1 if instruction.opcode == "dynamic-update-slice" else len(instruction.operands) - 1
            moved = sum(shape.bytes for shape in computation[instruction.operands[number]].shapes)
            return Uses((Use(number, moved),), (Use(0, moved),), ((0, 0),))
        if instruction.opcode in ("copy-start", "slice-start"):
            ends = instruction.shapes[:2]
            moved = min(shape.bytes for shape in ends)  # of a slice, what is cut out
            return Uses((), (), more=float(moved * sum(not shape.on_chip for shape in ends)))
        if instruction.opcode == "fusion":
            return _fusion_uses(self.program, computation, instruction)
        read = tuple(Use(n, _NEVER) for n, name in enumerate(instruction.operands) if name in computation)
        kernel = find(self.kernels, instruction) if instruction.opcode == "custom-call" else None
        told = 0.0
        if kernel and kernel.bytes:
            arrays = [s for name in instruction.operands for s in computation[name].shapes]
            told = max(kernel.bytes - sum(s.bytes for s in (*arrays, *instruction.shapes)), 0.0)
        return Uses(read, written, more=told)


def _last_uses(computation: Computation) -> dict[str, int]:
    return {name: at for at, instruction in enumerate(computation.values()) for name in instruction.operands}


def _fusion_uses(program: Program, computation: Computation, fusion: Instruction) -> Uses:
    """Operands and results, but only the parts of large arrays that the fusion slices or updates in place.

    Nothing of operands that it passes on, and of those that a later piece of a collective writes to: the first counts.
    """
    inner, aliases = program.computations[fusion.called()[0]], fusion.aliases
    root = next(i for i in inner.values() if i.is_root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    passed = {
        made.name
        for number, made in enumerate(results)
        if number in aliases and (made.opcode == "parameter" or made.channel_of_pieces)
    }
    read = [
        Use(n, _read_inside(program, inner, n, passed)) for n, name in enumerate(fusion.operands) if name in computation
    ]
    written, updated = [], []
    for number, (made, shape) in enumerate(zip(results, fusion.shapes, strict=False)):
        if made.name in passed:
            updated.append((number, aliases[number]))
            continue
        partial = made.opcode == "dynamic-update-slice"
        written.append(Use(number, inner[made.operands[1]].shapes[0].bytes if partial else shape.bytes))
        source = _parameter(inner, made.operands[0]) if partial else None
        updated += [] if source is None else [(number, source)]
    return Uses(tuple(read), tuple(written), tuple(updated))


def _parameter(inner: Computation, name: str) -> int | None:
    """The number of the parameter that is seen through bitcasts, if it is one."""
    while inner[name].opcode == "bitcast":
        name = inner[name].operands[0]
    return int(inner[name].value) if inner[name].opcode == "parameter" else None


def _read_inside(program: Program, inner: Computation, number: int, passed: Collection[str] = ()) -> float:
    """Bytes that a fused computation reads of its parameter `number`: slices, also in fusions inside; else inf.

    `passed` are the instructions that read nothing.
    """
    parameter = next(i for i in inner.values() if i.opcode == "parameter" and int(i.value) == number)
    names, total = {parameter.name}, 0.0
    for instruction in inner.values():
        for position, name in enumerate(instruction.operands):
            if name not in names or instruction.name in passed or (instruction.opcode == "tuple" and name in passed):
                continue
            if instruction.opcode == "bitcast" and not instruction.is_root:
                names.add(instruction.name)
            elif instruction.opcode == "fusion":
                total += _read_inside(program, program.computations[instruction.called()[0]], position)
            elif instruction.opcode in _READS_PART and position == 0:
                total += sum(s.bytes for s in instruction.shapes)
            elif instruction.opcode != "dynamic-update-slice" or position > 0:
                return math.inf
    return total
