"""Whether training on meshes of virtual CPU devices ends, each time: runs, saves, a resume, and what they hold.

    python -m benchmarks.cpu_meshes                        # 2 and 8 devices, every axis, 10 runs of each
    python -m benchmarks.cpu_meshes --devices=2x2,8 --axes=fsdp,tensor --runs=1     # 2x2: two processes of two devices

One run is two starts of train.py: five saves in ten steps, and a resume to step 12. They must exit with 0; its losses
must be those of one device (rtol 1e-5); and its last checkpoint, restored on one device, must have there the digests
that were taken on the mesh. The model is small and has many arrays: what is tried is how many programs are under way.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.local_processes import LocalProcesses
from sympow_jax.training.manifest import unflatten
from sympow_jax.training.metrics import METRICS_NAME, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
AXES = ("data", "fsdp", "tensor", "seq")
STEPS, RESUMED = 10, 12
SECONDS = 300.0  # of one start at most
FLAGS = {
    "model.num_layers": 2, "model.embed_dim": 32, "model.num_heads": 8, "model.head_dim": 4, "model.mlp_dim": 32,
    "data.seq_len": 64, "data.batch_size": 8, "attention.implementation": "chunked", "attention.chunk_size": 8,
    "evaluation.every_steps": 4, "evaluation.num_batches": 3, "evaluation.lengths": 64, "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 9, "logging.every_steps": 1, "logging.peak_flops": 1e12, "logging.tensorboard": "false",
    "optimizer.schedule": "constant", "optimizer.warmup_steps": 2, "mesh.data": 1,
    "model.scan_layers": "false",
}  # fmt: skip


def train(workdir: pathlib.Path, processes: int, devices: int, steps: int, **mesh: int) -> str:
    """train.py in so many processes of so many virtual devices; how one of them failed, "" where none did."""
    values = FLAGS | {"num_train_steps": steps} | {f"mesh.{axis}": size for axis, size in mesh.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with LocalProcesses(command, processes, workdir.with_suffix(".said"), cwd=ROOT, env=environment) as started:
        for index, code in enumerate(started.wait(SECONDS)):
            if code != 0:
                how = f"no end within {SECONDS:.0f} s" if code is None else f"exit {code}"
                return f"to step {steps}: process {index}: {how}: {started.errors(index).strip()[-300:]}"
    return ""


def losses(workdir: pathlib.Path) -> np.ndarray:
    """Of every step, and the held-out ones."""
    rows = read_metrics(workdir / METRICS_NAME)
    return np.array([row[name] for row in rows for name in ("loss", "heldout_loss") if name in row])


def fault(workdir: pathlib.Path, processes: int, devices: int, axis: str, want: np.ndarray) -> str:
    """What is wrong with one run; "" for nothing."""
    for steps in (STEPS, RESUMED):
        if failed := train(workdir, processes, devices, steps, **{axis: processes * devices}):
            return failed
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        if len(checkpointer.steps()) < 6:
            return f"checkpoints {checkpointer.steps()}"
        specs, _ = checkpointer.describe(RESUMED)
        checkpointer.restore(RESUMED, like=unflatten(specs), strict=True)  # compares the digests
    got = losses(workdir)
    if got.shape != want.shape or not np.allclose(got, want, rtol=1e-5, atol=0):
        return f"losses {got} instead of {want}"
    return ""


def study(devices: Sequence[str], axes: Sequence[str], runs: int) -> int:
    """Prints one line for each mesh; returns how many runs were at fault.

    Args:
      devices: "8" of one process, or "2x4": four in each of two.
      axes: of the mesh, which each takes all devices.
      runs: of each.
    """
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        one = pathlib.Path(folder, "one")
        for steps in (STEPS, RESUMED):
            if failed := train(one, 1, 1, steps):
                raise SystemExit(f"error: on one device: {failed}")
        want = losses(one)
        with Checkpointer(one / "checkpoints", read_only=True) as checkpointer:
            print(f"{len(checkpointer.describe(RESUMED)[0])} arrays, losses {want[0]:.4f} ... {want[-1]:.4f}")
        for where in devices:
            processes, each = map(int, f"1x{where}".split("x")[-2:])
            for axis in axes:
                start = time.perf_counter()
                workdirs = [pathlib.Path(folder, f"{axis}{where}-{i}") for i in range(runs)]
                bad = [text for workdir in workdirs if (text := fault(workdir, processes, each, axis, want))]
                seconds = (time.perf_counter() - start) / runs
                print(f"{axis} {where}: {runs - len(bad)} of {runs} sound, {seconds:.1f} s a run", *bad, flush=True)
                faults += len(bad)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="2,8")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    sys.exit(study(arguments.devices.split(","), arguments.axes.split(","), arguments.runs) > 0)


if __name__ == "__main__":
    main()
