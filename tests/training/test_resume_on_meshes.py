"""One run that moves from one device to eight, to a 2 x 4 mesh and to two processes, beside one that never moved."""

import pathlib
import shutil
import subprocess

import pytest

from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from tests.training.test_faults import ROOT, checkpoints, command, plain_environment
from tests.training.test_processes import free_port

pytestmark = pytest.mark.slow

FLAGS = {
    "data.batch_size": 8, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "evaluation.every_steps": 0,
    "data.order": "stream", "training.initial_state": "carried",
    "evaluation.num_batches": 1, "checkpoint.every_steps": 4, "checkpoint.keep_last": 9,
}  # fmt: skip


def train(workdir: pathlib.Path, steps: int, *, devices: int = 1, processes: int = 1, **mesh: int) -> None:
    """Trains to `steps` with `devices` in each of `processes`."""
    changes = FLAGS | {"num_train_steps": steps} | {f"mesh.{axis}": size for axis, size in mesh.items()}
    environment = plain_environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    together = ["--coordinator_address=127.0.0.1:" + str(free_port()), f"--num_processes={processes}"]
    more = [[*together, f"--process_id={number}"] if processes > 1 else [] for number in range(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command(workdir, *flags, **changes), cwd=ROOT, env=environment, **pipes) for flags in more
    ]
    try:
        for process in running:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, (output[-2000:], errors[-3000:])
    finally:
        for process in running:
            process.kill()


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir / METRICS_NAME) if "loss" in row}


def test_a_run_that_moves_between_meshes_and_processes_keeps_its_losses(tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(straight, 16)
    shutil.copytree(straight, moved)
    for step in (8, 12, 16):
        shutil.rmtree(moved / "checkpoints" / str(step))
    train(moved, 8, devices=8)
    train(moved, 12, devices=8, data=2, fsdp=4)
    train(moved, 16, processes=2)
    assert checkpoints(moved) == checkpoints(straight) == [4, 8, 12, 16]
    want, got = losses(straight), losses(moved)
    assert list(got) == list(want) == list(range(1, 17))
    assert got == pytest.approx(want, rel=1e-5)
    assert [got[step] for step in range(1, 5)] == [want[step] for step in range(1, 5)]
    assert min(abs(want[step] / want[step + 1] - 1) for step in range(1, 16)) > 1e-4  # another batch would be seen
