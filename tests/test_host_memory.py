import os
import platform
import subprocess
import sys

import pytest

from sympow_jax import command_line

ROUNDS = """
import ctypes, resource, threading
from sympow_jax import command_line

command_line._ACCELERATORS = ()
assert not {keep} or command_line.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use():
    block = libc.malloc({size})
    libc.memset(block, 1, {size})
    libc.free(block)

def rounds():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=rounds)  # programs run in threads of JAX
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.slow
def test_freed_memory_is_not_faulted_in_again():
    size = 2**28
    theirs = ("MALLOC_", "GLIBC_TUNABLES")
    unset = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}

    def faults(keep):
        code = ROUNDS.format(keep=keep, size=size)
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=unset).stdout)

    assert faults(False) > 4 * size // 2**21  # once a round, in pages of 4 KiB or 2 MiB
    assert faults(True) < size // 2**21


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "8"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_what_the_environment_says_of_malloc_stays(name, value, monkeypatch):
    monkeypatch.setattr(command_line, "_ACCELERATORS", ())
    monkeypatch.setattr(command_line.ctypes, "CDLL", None)  # nothing may be called
    monkeypatch.setenv(name, value)
    assert not command_line.keep_freed_memory()


def test_nothing_changes_beside_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "_ACCELERATORS", (str(tmp_path),))
    monkeypatch.setattr(command_line.ctypes, "CDLL", None)
    assert not command_line.keep_freed_memory()
