import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, threading
import jax, jax.numpy as jnp
from sympow_jax.host_memory import keep_freed_memory

assert not {keep} or keep_freed_memory()
program = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(jnp.sin(x + jnp.arange(2.0**24)))))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(1.0).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_s_temporaries_are_faulted_in_once():
    def faults(keep):
        out = subprocess.run(
            [sys.executable, "-c", ROUNDS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return [int(line) for line in out.stdout.split()]

    pages = 2**24 * 4 // 4096
    assert faults(False)[-1] > pages / 2
    assert faults(True)[-1] < pages / 100
