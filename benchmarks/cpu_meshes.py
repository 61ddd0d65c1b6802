"""Whether training on meshes of virtual CPU devices ends, each time: runs, saves, a resume, and what they hold.

    python -m benchmarks.cpu_meshes                        # 2 and 8 devices, every axis, 10 runs of each
    python -m benchmarks.cpu_meshes --devices=2x2,8 --axes=fsdp --runs=50     # 2x2: two processes of two devices

--root=FOLDER, which must not exist, keeps the run of one device and those at fault; sound ones are deleted as they end.
Each fault is printed as it comes, and the exit code is 1 if there was one.

One run is two starts of train.py: five saves in ten steps, and a resume to step 12. They must exit with 0; its losses
must be those of one device (rtol 1e-5); and its last checkpoint, restored on one device, must have there the digests
that were taken on the mesh. The model is small and has many arrays: what is tried is how many programs are under way.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shutil
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
    "optimizer.schedule": "constant", "optimizer.warmup_steps": 2, "optimizer.learning_rate": 3e-3, "mesh.data": 1,
    "model.scan_layers": "false",
}  # fmt: skip


def train(workdir: pathlib.Path, processes: int, devices: int, steps: int, **mesh: int) -> str:
    """train.py in so many processes of so many virtual devices; how one of them failed, "" where none did."""
    values = FLAGS | {"num_train_steps": steps} | {f"mesh.{axis}": size for axis, size in mesh.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with LocalProcesses(command, processes, said(workdir), cwd=ROOT, env=environment) as started:
        for index, code in enumerate(started.wait(SECONDS)):
            if code != 0:
                how = f"no end within {SECONDS:.0f} s" if code is None else f"exit {code}"
                return f"to step {steps}: process {index}: {how}: {started.errors(index).strip()[-300:]}"
    return ""


def said(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of what the processes of a run printed."""
    return workdir.with_suffix(".said")


def losses(workdir: pathlib.Path) -> np.ndarray:
    """Of every step, and the held-out ones."""
    rows = read_metrics(workdir / METRICS_NAME)
    return np.array([row[name] for row in rows for name in ("loss", "heldout_loss") if name in row])


def fault(workdir: pathlib.Path, processes: int, devices: int, axis: str, want: np.ndarray) -> str:
    """What is wrong with one run; "" for nothing."""
    try:
        for steps in (STEPS, RESUMED):
            if failed := train(workdir, processes, devices, steps, **{axis: processes * devices}):
                return failed
        return fault_of_files(workdir, want)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"  # one run of many: the others are tried too


def fault_of_files(workdir: pathlib.Path, want: np.ndarray) -> str:
    """What is wrong with the checkpoints and losses that a run left; "" for nothing."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        if len(checkpointer.steps()) < 6:
            return f"checkpoints {checkpointer.steps()}"
        specs, _ = checkpointer.describe(RESUMED)
        checkpointer.restore(RESUMED, like=unflatten(specs), strict=True)  # compares the digests
    got = losses(workdir)
    if got.shape != want.shape or not np.allclose(got, want, rtol=1e-5, atol=0):
        return f"losses {got} instead of {want}"
    return ""


def sizes(where: str) -> tuple[int, int]:
    """Processes, and the devices of each: (1, 8) of "8", (2, 4) of "2x4".

    Raises:
      ValueError: something else.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", where)
    if not found:
        raise ValueError(f"--devices = {where!r}: a number of devices such as 8, or PROCESSESxDEVICES such as 2x4")
    return int(found[1] or 1), int(found[2])


def check(devices: Sequence[str], axes: Sequence[str], runs: int) -> None:
    """Raises ValueError, one line, for what `study` cannot try."""
    for where in devices:
        sizes(where)
    for axis in axes:
        if axis not in AXES:
            raise ValueError(f"--axes = {axis!r}: choose from {', '.join(AXES)}")
    if runs < 1:
        raise ValueError(f"--runs = {runs}: must be at least 1")


def study(devices: Sequence[str], axes: Sequence[str], runs: int, root: pathlib.Path | None = None) -> int:
    """Prints each fault as it comes, and one line for each mesh; returns how many runs were at fault.

    Args:
      devices: "8" of one process, or "2x4": four in each of two.
      axes: of the mesh, which each takes all devices.
      runs: of each.
      root: an empty folder, which keeps the run of one device and the runs at fault; a temporary one without it.
    """
    check(devices, axes, runs)
    with contextlib.nullcontext(root) if root else tempfile.TemporaryDirectory() as folder:
        want = reference(pathlib.Path(folder, "one"))
        meshes = [(axis, where) for where in devices for axis in axes]
        return sum(faults_of_mesh(pathlib.Path(folder), axis, where, runs, want) for axis, where in meshes)


def reference(workdir: pathlib.Path) -> np.ndarray:
    """The losses of one device."""
    for steps in (STEPS, RESUMED):
        if failed := train(workdir, 1, 1, steps):
            raise SystemExit(f"error: on one device: {failed}")
    want = losses(workdir)
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        arrays = len(checkpointer.describe(RESUMED)[0])
    print(f"{arrays} arrays, losses {want[0]:.4f} ... {want[-1]:.4f}", flush=True)
    return want


def faults_of_mesh(folder: pathlib.Path, axis: str, where: str, runs: int, want: np.ndarray) -> int:
    """How many runs on one mesh were at fault."""
    processes, devices = sizes(where)
    start, faults = time.perf_counter(), 0
    for number in range(runs):
        workdir = folder / f"{axis}{where}-{number}"
        if text := fault(workdir, processes, devices, axis, want):
            print(f"{workdir.name}: {text}", flush=True)
            faults += 1
        else:
            shutil.rmtree(workdir)
            shutil.rmtree(said(workdir))
    seconds = (time.perf_counter() - start) / runs
    print(f"{axis} {where}: {runs - faults} of {runs} sound, {seconds:.1f} s a run", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="2,8")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--root", type=pathlib.Path)
    arguments = parser.parse_args()
    devices, axes = arguments.devices.split(","), arguments.axes.split(",")
    try:
        check(devices, axes, arguments.runs)
        if arguments.root:
            arguments.root.mkdir(parents=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    jax.config.update("jax_platforms", "cpu")
    sys.exit(study(devices, axes, arguments.runs, arguments.root) > 0)


if __name__ == "__main__":
    main()
