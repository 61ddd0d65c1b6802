"""What one device does in a program: floating-point operations of its products, and bytes through its memory."""

import math
import re

from sympow_jax.planning.hlo import Computation, Instruction, Program, Shape

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "domain",
}  # fmt: skip
_READS_PART = ("dynamic-slice", "slice", "gather")


def flops(program: Program) -> dict[str, float]:
    """{operand type: FLOPs} of all products, a multiply-add counting 2, loops counted as often as they run."""
    total: dict[str, float] = {}
    for computation, instruction, times, _ in program.executed():
        count = _product_flops(computation, instruction)
        if count:
            dtype = _widest(computation, instruction)
            total[dtype] = total.get(dtype, 0.0) + count * times
    return total


def _widest(computation: Computation, instruction: Instruction) -> str:
    types = {s.dtype for name in instruction.operands[:2] for s in computation[name].shapes[:1]}
    return "float32" if types & {"f32", "f64"} else "bfloat16"


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].shapes[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return _dot_flops(instruction.shapes[0], lhs, contracted.group(1) if contracted else "")
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call" and "__cublas" in instruction.attributes:
        contracted = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        lhs = computation[instruction.operands[0]].shapes[0]
        return _dot_flops(instruction.shapes[0], lhs, contracted.group(1).replace('"', "") if contracted else "")
    if instruction.opcode == "custom-call":  # a kernel tells its own count, if its author gave one
        estimate = re.search(r'cost_estimate":?\s*\{"?flops"?:\s*"?(\d+)', instruction.attributes)
        return float(estimate.group(1)) if estimate else 0.0
    return 0.0


def _dot_flops(out: Shape, lhs: Shape, contracted: str) -> float:
    return 2.0 * out.size * math.prod(lhs.dims[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """2 x outputs x input features x the window's positions that meet data rather than padding or dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    lhs_labels, rhs_labels, out_labels = labels.groups()
    lhs, rhs = (computation[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    total = 2.0 * rhs.dims[rhs_labels.index("i")]
    # groups of the batch or of the features are in these sizes already
    total *= out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")]
    window = _window(instruction)
    for axis in range(len(lhs_labels) - 2):
        letter = str(axis)
        sizes = lhs.dims[lhs_labels.index(letter)], out.dims[out_labels.index(letter)]
        total *= _valid_positions(*sizes, **{name: values[axis] for name, values in window.items()})
    return total


def _window(instruction: Instruction) -> dict[str, list]:
    text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in text.group(1).split()) if text else {}
    rank = len(fields["size"].split("x")) if fields else 0
    parsed: dict[str, list] = {}
    for name, default in (("size", 1), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1)):
        parsed[name] = [int(v) for v in fields[name].split("x")] if name in fields else [default] * rank
    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * rank
    parsed["low"] = [int(p.split("_")[0]) for p in pads]
    return parsed


def _valid_positions(
    in_size: int, out_size: int, *, size: int, stride: int, lhs_dilate: int, rhs_dilate: int, low: int
) -> int:
    """Pairs (output, window position) of one spatial dim that read an element of the input."""
    if size == 1 and low == 0 and lhs_dilate == 1:
        return out_size
    count = 0
    for position in range(size):
        for o in range(out_size):
            at = o * stride + position * rhs_dilate - low
            count += at % lhs_dilate == 0 and 0 <= at // lhs_dilate < in_size
    return count


def memory_bytes(program: Program) -> float:
    """Bytes that one device reads and writes in its main memory: the arguments and results of every kernel."""
    return sum(
        _traffic(program, computation, instruction) * times
        for computation, instruction, times, fused in program.executed()
        if not fused and instruction.opcode not in _FREE
    )


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _main_bytes(instruction.shapes)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = computation[instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]]
        return 2.0 * _main_bytes(update.shapes)
    if instruction.opcode in ("copy-start", "slice-start"):
        moved = min(shape.bytes for shape in instruction.shapes[:2])  # of a slice, what is cut out
        return float(moved * sum(not shape.on_chip for shape in instruction.shapes[:2]))
    if instruction.opcode == "fusion":
        return _fusion_traffic(program, computation, instruction)
    read = sum(_main_bytes(computation[name].shapes) for name in instruction.operands if name in computation)
    return float(read + _main_bytes(instruction.shapes))


def _main_bytes(shapes) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _fusion_traffic(program: Program, computation: Computation, fusion: Instruction) -> float:
    """Operands and results, but only the parts of large arrays that the fusion slices or updates in place."""
    inner = program.computations[fusion.called()[0]]
    total = 0.0
    for number, operand in enumerate(fusion.operands):
        outer = computation[operand].shapes
        if not any(s.on_chip for s in outer):
            total += min(_read_inside(program, inner, number), _main_bytes(outer))
    root = next(i for i in inner.values() if i.is_root)
    written = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for made, shape in zip(written, fusion.shapes, strict=False):
        if not shape.on_chip:
            partial = made.opcode == "dynamic-update-slice"
            total += inner[made.operands[1]].shapes[0].bytes if partial else shape.bytes
    return total


def _read_inside(program: Program, inner: Computation, number: int) -> float:
    """Bytes that a fused computation reads of its parameter `number`: slices, also in fusions inside; else inf."""
    parameter = next(i for i in inner.values() if i.opcode == "parameter" and int(i.value) == number)
    names, total = {parameter.name}, 0.0
    for instruction in inner.values():
        for position, name in enumerate(instruction.operands):
            if name not in names:
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
