"""One row of a plan for each kernel: its work by its author, and its static schedule where the compiler shows it."""

from collections.abc import Callable
from typing import Any

from sympow_jax.planning.kernels import Call
from sympow_jax.planning.schedules import Schedule, seconds
from sympow_jax.planning.targets import Target


def kernel_report(call: Call, target: Target, schedule: Callable[[Call], Schedule] | None) -> dict[str, Any]:
    """Of one call: FLOPs, bytes, VMEM, and with `schedule` on TPUs bundles, shares of the matrix units and seconds.

    The static time counts only if every step of the grid does the same products: then its bundles times the steps are
    a bound, but for the branches of the first and the last step of a row, which are counted in each.
    """
    kernel, peak = call.kernel, target.device.peak
    at_peak = ((kernel and kernel.flops) or 0.0) / peak
    row = {
        "name": call.name,
        "times": call.times,
        "flops": kernel and kernel.flops,
        "bytes": kernel and kernel.bytes,
        "vmem_bytes": call.vmem_bytes,
        "beyond_peak": 0.0,
    }
    if schedule is None or target.platform != "tpu":
        return row
    found = schedule(call)
    row |= {"bundles_per_step": found.bundles, "matrix_busy": found.matrix_busy}
    if kernel and kernel.even and kernel.steps:
        static = seconds(call, found, target)
        row |= {"seconds": static, "useful_share": at_peak / static, "beyond_peak": max(static - at_peak, 0.0)}
    return row


def kernel_text(row: dict[str, Any]) -> str:
    """A row for people."""
    text = f"{row['times']:,.0f} times"
    if row["flops"]:
        text += f", {row['flops']:.4g} FLOPs and {(row['bytes'] or 0) / 1e6:,.1f} MB each"
    if row["vmem_bytes"]:
        text += f", {row['vmem_bytes'] / 2**20:.1f} MiB of VMEM"
    if "bundles_per_step" in row:
        text += f"; {row['bundles_per_step']:,} bundles a step, matrix units busy in {row['matrix_busy']:.0%}"
    if "seconds" in row:
        text += f", {row['useful_share']:.0%} of their peak, {row['seconds'] * 1e3:.3g} ms each"
    return text
