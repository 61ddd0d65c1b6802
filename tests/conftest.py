"""Test-wide settings: CPU, eight virtual devices, strict promotion, and a compilation cache that outlives the run."""

import gc
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without fusion emitters, and with a program's functions in one piece, the jax that Python 3.11 has compiles several
# times faster; later ones lack the switches.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    + ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"] * (sys.version_info < (3, 12))
)

import jax
import numpy as np
import pytest

import tests.typechecker  # noqa: F401  (the hook finds it as an attribute of `tests`)

gc.set_threshold(200_000, 20, 100)  # what the imports of the tests make stays
CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of the time of lowering
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # of what module-wide fixtures compile


@pytest.fixture(autouse=True)
def compilation(request: pytest.FixtureRequest) -> None:
    """Machine code without optimisation, made in a third of the time, for all tests that do not ask for the other."""
    marks = {mark.name for mark in request.node.iter_markers()}
    jax.config.update("jax_disable_most_optimizations", "quick" in marks or not marks & {"slow", "optimised"})


@pytest.fixture(scope="module", autouse=True)
def no_rescans() -> None:
    """What earlier modules left in JAX's caches is not looked through again by collections of garbage."""
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh, fixed random generator for each test."""
    return np.random.default_rng(0)
