"""How long an asynchronous save holds the training loop, beside one copy of the same arrays; and the restore.

    python benchmarks/checkpoint.py [--megabytes=400] [--repeats=3]

"digest" is the pass over the arrays that lets a restore find damage, "stall" all that `save` holds the caller for
(digest and copy included), "write" the time until the checkpoint is on disk. Best of the repeats.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.digests import digest_arrays

NUM_ARRAYS = 48


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(arrays: dict[str, jax.Array], repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in ("copy", "digest", "stall", "write", "restore")}
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    digest_arrays(arrays)
    with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep_last=1) as checkpointer:
        for step in range(repeats):
            found["copy"].append(seconds(lambda: [np.array(x) for x in arrays.values()]))
            found["digest"].append(seconds(lambda: digest_arrays(arrays)))
            found["stall"].append(seconds(lambda step=step: checkpointer.save(step, arrays, metadata={})))
            found["write"].append(found["stall"][-1] + seconds(checkpointer.wait))
            found["restore"].append(seconds(lambda: checkpointer.restore(like=like)))
    return {name: min(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    rows = flags.megabytes * 1_000_000 // (4 * 1024 * NUM_ARRAYS)
    key = jax.random.key(0)
    arrays = {f"{i:02}": jax.random.normal(jax.random.fold_in(key, i), (rows, 1024)) for i in range(NUM_ARRAYS)}
    jax.block_until_ready(arrays)
    size = sum(x.nbytes for x in arrays.values()) / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}: {size:,.0f} MB")
    times = measure(arrays, flags.repeats)
    for name, value in times.items():
        print(f"{name:>8} {1e3 * value:>9.1f} ms {value / times['copy']:>8.2f} x copy")


if __name__ == "__main__":
    main()
