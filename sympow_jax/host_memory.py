"""Memory of the process that runs a CPU's programs."""

import ctypes
import glob
import os
import platform

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # mallopt(3)


def keep_freed_memory() -> bool:
    """Keeps what a program frees for the next one, where programs run on the CPU; returns whether it does.

    XLA allocates the temporaries of a program when it starts and frees them when it ends. glibc gives blocks of that
    size back to the system at once, so that every step faults in, and the system clears, each page again
    (RESULTS.md, training step). The price is memory: the process keeps the most that it ever used, compilation and
    checkpoints included, and a block that finds no hole of its size grows the heap. Call it before JAX starts its
    threads, which would take heaps of their own.

    Nothing changes beside an accelerator, with another C library, or where the environment already sets glibc's malloc
    (MALLOC_* or GLIBC_TUNABLES; MALLOC_ARENA_MAX=8 is enough to turn this off).
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    accelerated = any(glob.glob(pattern) for pattern in _ACCELERATORS)
    if platform.libc_ver()[0] != "glibc" or accelerated or theirs:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
