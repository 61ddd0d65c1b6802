"""What one device does in a program: floating-point operations of its products."""

import math
import re
from collections.abc import Sequence

from sympow_jax.planning.hlo import Computation, Instruction, Program, Shape
from sympow_jax.planning.kernels import Kernel, find, is_kernel


def flops(program: Program, kernels: Sequence[Kernel] = ()) -> dict[str, float]:
    """{operand type: FLOPs} of all products, a multiply-add counting 2, loops counted as often as they run.

    Of a kernel its author's estimate counts.
    """
    total: dict[str, float] = {}
    for computation, instruction, times, _ in program.executed():
        if is_kernel(instruction):
            kernel = find(kernels, instruction)
            count = (kernel and kernel.flops) or 0.0
        else:
            count = _product_flops(computation, instruction)
        if count:
            dtype = widest(computation, instruction)
            total[dtype] = total.get(dtype, 0.0) + count * times
    return total


def widest(computation: Computation, instruction: Instruction) -> str:
    """float32 or bfloat16: the type at whose speed a product of the first two operands runs."""
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
