"""Compiling without optimisation: most of the time of the tests of small programs is XLA's."""

import functools

import jax

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later compilers lack the switch; where it is, it saves two thirds of the time
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False

fast_jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
