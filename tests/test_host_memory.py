import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource
import jax, jax.numpy as jnp
from sympow_jax.host_memory import keep_freed_memory

assert not {keep} or keep_freed_memory()
program = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(jnp.sin(x + jnp.arange(2.0**24)))))
program(1.0).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    program(1.0).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_s_temporaries_are_not_faulted_in_again():
    def faults(keep):
        out = subprocess.run(
            [sys.executable, "-c", ROUNDS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return float(out.stdout)

    pages = 2**24 * 4 // 4096
    assert faults(False) > 0.9 * pages
    assert faults(True) < 0.5 * pages  # a heap may grow once or twice before a block is found again
