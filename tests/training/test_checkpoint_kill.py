"""A process that saves as fast as it can is killed at random moments; what it leaves must be sound."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sympow_jax.training.checkpoint import Checkpointer

SAVE = """
import sys
import numpy as np
from sympow_jax.training.checkpoint import Checkpointer

checkpointer = Checkpointer(sys.argv[1], keep_last=2)
step = max(checkpointer.steps(), default=0)
print("ready", flush=True)
while True:
    step += 1
    rng = np.random.default_rng(step)
    tree = {str(i): rng.standard_normal((64, 1 << 10)).astype(np.float32) for i in range(4)}
    checkpointer.save(step, tree, metadata={"step": step}, metrics={"heldout_loss": abs(step - 5.0)})
    print(step, flush=True)  # every step before this one is on disk
"""


def expected(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {str(i): rng.standard_normal((64, 1 << 10)).astype(np.float32) for i in range(4)}


@pytest.mark.slow
def test_kill_at_random_moments_of_continuous_saving(tmp_path, rng):
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in expected(1).items()}
    leftovers = 0
    for number in range(12):
        with subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
            if number % 2:  # at the beginning of a save, on a machine of any speed
                while saver.poll() is None and not any(tmp_path.glob("*tmp*")):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0.0, 0.01))
            else:
                time.sleep(rng.uniform(0.3, 1.2))
            saver.send_signal(signal.SIGKILL)
            started = [int(line) for line in saver.stdout.read().split("\n")[:-1]]
        names = [path.name for path in tmp_path.iterdir()]
        leftovers += any("tmp" in name for name in names)
        with Checkpointer(tmp_path, read_only=True) as reader:
            steps = reader.steps()
            restored = reader.restore(like=like, strict=True) if steps else None
            newest = steps[-1] if steps else 0  # none yet, when the kill fell into the first save
            assert not started or newest >= max(started) - 1
            assert len(steps) >= min(2, max(started, default=0) - 1)
        if restored is not None:
            assert restored.metadata == {"step": restored.step}
            for name, want in expected(restored.step).items():
                assert np.array_equal(np.asarray(restored.tree[name]), want), name
    assert leftovers >= 1  # the kills did hit saves
    Checkpointer(tmp_path).close()
    assert all(path.name.isdigit() for path in tmp_path.iterdir())
