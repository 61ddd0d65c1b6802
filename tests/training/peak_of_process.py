"""One process of a sharded run: how far its memory grows in each phase, beside all parameters and optimizer states.

python tests/training/peak_of_process.py PORT COUNT INDEX PHASE=FOLDER...      prints a JSON line
"""

import ctypes
import functools
import gc
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sympow_jax.config import parse_flags
from sympow_jax.models.model import Model
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.train_state import abstract_train_state, create_train_state, from_tree, to_tree

FLAGS = {
    "model.embed_dim": 1024, "model.num_layers": 8, "model.num_heads": 16, "model.head_dim": 64,
    "model.mlp_dim": 4096, "model.scan_layers": True, "mesh.data": 1,
}  # fmt: skip


def kib(name: str) -> int:
    """A line of this process's status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def growth(phase: Callable[[], None]) -> int:
    """Bytes that the resident memory grows by at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = kib("VmRSS")
    phase()
    return 1024 * (kib("VmHWM") - before)


class Process:
    """The phases of a run, each with what the ones before it left."""

    def __init__(self, count: int):
        flags = FLAGS | {"mesh.fsdp": count, "data.batch_size": count}
        config = parse_flags(["--config=configs/default.py", *(f"--config.{key}={v}" for key, v in flags.items())])
        self.model, self.count = Model(config, 256, config_mesh(config)), count
        self.shapes = abstract_train_state(self.model)
        self.state: Any = None

    def whole(self) -> int:
        """Bytes of all parameters and optimizer states."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))

    def create(self, _: str) -> None:
        self.state = jax.block_until_ready(create_train_state(self.model, 0))

    def save(self, folder: str) -> None:
        with Checkpointer(folder) as checkpointer:
            checkpointer.save(1, to_tree(self.state), metadata={}, force=True)

    def restore(self, folder: str) -> None:
        with Checkpointer(folder, read_only=True) as checkpointer:
            self.state = from_tree(checkpointer.restore(1, like=to_tree(self.shapes)).tree, self.shapes)

    def evaluate(self, _: str) -> None:
        tokens = np.zeros((self.count, 65), np.int32)
        nll = jax.jit(lambda params, tokens: self.model.nll(params, tokens[:, :-1], tokens[:, 1:])[0])
        jax.block_until_ready(nll(self.state.params, tokens))


def main() -> None:
    port, count, index, *phases = sys.argv[1:]
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    process, peaks = Process(int(count)), {}
    for phase, _, folder in (phase.partition("=") for phase in phases):
        if phase == "restore":
            process.state = None
        held = 0 if process.state is None else process.whole() // int(count)
        peaks[phase] = held + growth(functools.partial(getattr(process, phase), folder))
    print(json.dumps({"whole": process.whole(), "peaks": peaks}))


if __name__ == "__main__":
    main()
