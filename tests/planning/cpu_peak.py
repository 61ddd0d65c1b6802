"""Runs one train step of a config and prints its peak of resident memory, with arguments, in bytes.

python tests/planning/cpu_peak.py --config=... [--config.a.b=value ...]
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import config as config_lib
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found, field
    return int(found.group(1)) * 1024


def main(argv: list[str]) -> None:
    config = resolve_implementation(config_lib.parse_flags(argv))
    model = Model(config, 257)
    step = make_train_step(model)
    shapes = jax.eval_shape(lambda: create_train_state(model, 0))
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)
    compiled = step.lower(shapes, {"inputs": tokens, "targets": tokens}).compile()
    before = resident("VmRSS")
    batch = {name: jnp.asarray(np.full(tokens.shape, 7, np.int32)) for name in ("inputs", "targets")}
    state = jax.block_until_ready(create_train_state(model, 0))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    jax.block_until_ready(compiled(state, batch))
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1:])
