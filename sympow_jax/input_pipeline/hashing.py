"""Counter-based random numbers: the same on every machine, numpy version and number of readers."""

import hashlib

import numpy as np


def random_bits(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` uint64 numbers, a pure function of (seed, stream): splitmix64 (Steele, Lea and Flood, 2014)."""
    key = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    start = np.frombuffer(key[:8], "<u8").astype(np.uint64)
    z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """A random order of 0..count-1, [count] int64, a pure function of (seed, stream, count)."""
    return np.argsort(random_bits(seed, stream, count), kind="stable")
