"""Peak FLOP/s of one device, what model FLOPs utilisation refers to."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 peaks from the vendors' data sheets.
KNOWN_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(given: float, dtype: str) -> float:
    """`given` if positive, else the data sheet's bfloat16 peak, else the speed of a matrix product measured now."""
    if given > 0:
        return given
    return KNOWN_PEAKS.get(jax.devices()[0].device_kind) or _measured(dtype)


def _measured(dtype: str) -> float:
    size = 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
