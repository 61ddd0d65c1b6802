"""Test-wide settings: CPU, eight virtual devices, strict promotion, and a compilation cache that outlives the run."""

import os
import pathlib
import sys
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The fusion emitters, which jax < 0.11 can do without, take most of the time to compile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + (" --xla_cpu_use_fusion_emitters=false" if sys.version_info < (3, 12) else "")
)

import jax
import numpy as np
import pytest

CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Machine code without optimisation: for tests of whole models, which compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh, fixed random generator for each test."""
    return np.random.default_rng(0)
