"""Timing shared by the benchmarks: interleaved runs, a GEMM probe in the same run, peak memory."""

import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PROBE_SIZE = 2048


def gemm_probe(size: int = PROBE_SIZE) -> tuple[Callable[[], object], float]:
    """A float32 matrix product and its FLOPs: what this machine can do at this moment."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    return lambda: product(matrix), 2.0 * size**3


def interleaved(cases: dict[str, Callable[[], object]], *, seconds: float, repeats: int = 7) -> dict[str, dict]:
    """Runs the compiled cases in turn until the time is over; seconds per run of each, and the median of CPU seconds.

    CPU seconds, of all threads of this process, compare cases where other work on the machine moves the time.
    The first round is a warm-up that does not count, unless it takes half of the time.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    start = time.perf_counter()
    for done in range(repeats + 1):
        for name, case in cases.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(case())
            times[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
        if time.perf_counter() - start > (seconds if done else seconds / 2):
            break
    return {
        name: {**summary(values[1:] or values), "cpu_median": float(np.median(cpu[name][1:] or cpu[name]))}
        for name, values in times.items()
    }


def summary(times: list[float]) -> dict:
    """Median, quartiles and minimum, in seconds."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": median, "iqr": [low, high], "best": min(times), "runs": len(times)}


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
