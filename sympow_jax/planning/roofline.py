"""The least time that a step can take: its work against the peaks of the device."""

import dataclasses

from sympow_jax.planning.targets import Target

SECONDS_A_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds, not predictions: a real step takes longer.

    Attributes:
      compute_seconds: FLOPs of the compiled program over the peaks of their types, at least the model's (a kernel of a
        library, as cuDNN's attention, does not tell its own); kernels whose schedule is known take at least that.
      memory_seconds: bytes through device memory over its bandwidth.
      network_seconds: exchanges over the links that they can use.
      step_seconds: the largest of the three, as if they overlapped perfectly.
      bound: which of them it is.
      mfu: model FLOPs over peak bfloat16 FLOPs in step_seconds.
      tokens_per_second, tokens_per_day: of the whole target.
      days: for all tokens of the config.
    """

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    tokens_per_day: float
    days: float


def roofline(
    target: Target,
    *,
    num_devices: int,
    flops: dict[str, float],
    memory_bytes: float,
    network_seconds: float,
    model_flops: float,
    tokens_per_step: int,
    num_steps: int,
    beyond_peak: float = 0.0,
) -> Roofline:
    """The bounds of one step.

    Args:
      target: gives the peaks of one device.
      num_devices: devices that take part.
      flops: {operand type: FLOPs of one device}.
      memory_bytes: of one device.
      network_seconds: of one device.
      model_flops: exact FLOPs of the model for the whole step, over all devices.
      tokens_per_step: tokens of the global batch.
      num_steps: steps of the run.
      beyond_peak: seconds that the schedules of kernels take longer than their FLOPs at the peak.
    """
    peaks = {"float32": target.device.peak_float32, "bfloat16": target.device.peak}
    times = {
        "compute": max(
            sum(count / peaks[dtype] for dtype, count in flops.items()) + beyond_peak,
            model_flops / (num_devices * target.device.peak),
        ),
        "memory": memory_bytes / target.device.hbm_bandwidth,
        "network": network_seconds,
    }
    bound = max(times, key=lambda name: times[name])
    step = times[bound]
    rate = tokens_per_step / step
    return Roofline(
        times["compute"], times["memory"], times["network"], step, bound,
        model_flops / (num_devices * target.device.peak * step),
        rate, rate * SECONDS_A_DAY, num_steps * step / SECONDS_A_DAY,
    )  # fmt: skip
