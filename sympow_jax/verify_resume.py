"""Proves on this machine, with this config, that killed and resumed training equals uninterrupted training bit for bit.

    python -m sympow_jax.verify_resume --config=configs/NAME.py[:VARIANT] [--config.a.b=v ...]
        [--steps=20] [--kills=1] [--every=5] [--seed=0] [--root=DIR]

Trains `steps` steps once without a break. Then trains the same again, killed with kill -9 at `kills` random moments
and started again each time, with a checkpoint every `every` steps. Every array of the two last
checkpoints and every metric but the timings must be equal. Exits 0 if they are and 1 if not. On GPUs, bitwise equal
training may need XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sympow_jax.command_line import flag_value, run_program, split_flags, use_compilation_cache
from sympow_jax.config import Config, override, parse_flags, resolve
from sympow_jax.files import read_json, write_json_atomic
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.loop import train
from sympow_jax.training.manifest import flatten, unflatten
from sympow_jax.training.metrics import METRICS_NAME, last_logged_step, read_metrics
from sympow_jax.training.workdir import WorkdirError

TIMINGS = frozenset(
    (
        "tokens_per_sec",
        "tokens_per_sec_per_device",
        "mfu",
        "data_wait_fraction",
        "checkpoint_fraction",
        "compute_fraction",
        "save_stall_seconds",
        "restore_seconds",
        "lost_steps",
    )
)
OPTIONS = {"steps": 20, "kills": 1, "every": 5, "seed": 0}
_TRAIN = "--train-from-json"


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill -9: the last step that was logged before it, and the step that the next start resumed from."""

    step: int
    resumed_from: int


def read_arrays(workdir: str | pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, arrays by name) of the newest checkpoint, on the host."""
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        step = max(checkpointer.steps(), default=-1)
        specs, _ = checkpointer.describe(step)
        tree = checkpointer.restore(step, like=unflatten(specs)).tree
    return step, {name: np.asarray(array) for name, array in flatten(tree).items()}


def read_untimed_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the timings."""
    rows = read_metrics(pathlib.Path(workdir) / METRICS_NAME)
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def differences(first: str | pathlib.Path, second: str | pathlib.Path) -> list[str]:
    """What differs between two finished runs: step, arrays bit for bit, metrics but timings; one line each."""
    (step_a, a), (step_b, b) = read_arrays(first), read_arrays(second)
    found = [] if step_a == step_b else [f"last step: {step_a} and {step_b}"]
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append(f"{name}: only in one of them")
        elif a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
            found.append(f"{name}: different bits")
    rows_a, rows_b = read_untimed_metrics(first), read_untimed_metrics(second)
    if len(rows_a) != len(rows_b):
        found.append(f"{METRICS_NAME}: {len(rows_a)} and {len(rows_b)} rows")
    unequal = [(one, two) for one, two in zip(rows_a, rows_b, strict=False) if one != two]
    return found + [f"{METRICS_NAME}: {one} and {two}" for one, two in unequal[:3]]


def verify(config: Config, root: pathlib.Path, *, steps: int, kills: int, every: int, seed: int) -> list[str]:
    """Runs the proof in `root`; returns what differs, nothing if all is well. Prints what it does."""
    changes = {"num_train_steps": steps, "checkpoint.every_steps": every, "logging.every_steps": 1}
    write_json_atomic(root / "config.json", dataclasses.asdict(override(config, changes)))
    straight, broken = root / "straight", root / "broken"
    started = time.monotonic()
    with _start(root, straight) as process:
        _finish(process, straight)
    print(f"uninterrupted: {steps} steps in {time.monotonic() - started:.1f} s", flush=True)
    rng = random.Random(seed)
    for number, target in enumerate(sorted(rng.randrange(1, steps) for _ in range(kills)), 1):
        kill = _run_and_kill(root, broken, target, rng)
        print(f"kill {number}: after step {kill.step}; the newest checkpoint is {kill.resumed_from}", flush=True)
    with _start(root, broken) as process:
        _finish(process, broken)
    return differences(straight, broken)


def _start(root: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sympow_jax.verify_resume", _TRAIN, str(root / "config.json"), str(workdir)]
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "output.txt", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    if process.wait() != 0:
        tail = (workdir / "output.txt").read_text(errors="replace")[-2000:]
        raise WorkdirError(f"training in {workdir} exited with {process.returncode}:\n{tail}")


def _run_and_kill(root: pathlib.Path, workdir: pathlib.Path, target: int, rng: random.Random) -> Kill:
    """Starts training, and kills it a random moment after `target` is logged (or after its start, if it was before)."""
    with _start(root, workdir) as process:
        begun, delay, seen, reached = time.monotonic(), rng.uniform(0.0, 0.3), last_logged_step(workdir), None
        while process.poll() is None:
            seen = last_logged_step(workdir)
            if seen >= target:
                reached = reached or time.monotonic()
                if time.monotonic() - reached > delay:
                    process.kill()
            elif time.monotonic() - begun > 600:
                process.kill()
                raise WorkdirError(f"training in {workdir} did not reach step {target} in 600 s; see output.txt there")
            time.sleep(0.005)
    if process.returncode != -signal.SIGKILL:
        _finish(process, workdir)  # it was done before the kill
    checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
    return Kill(seen, max(checkpoints.steps(), default=0))


def run(argv: Sequence[str]) -> int:
    """Runs the proof that the flags name; returns 0 if all is equal and 1 if not."""
    if list(argv[:1]) == [_TRAIN]:
        use_compilation_cache()
        return train(resolve(read_json(argv[1])), argv[2])
    own, rest = split_flags(argv, [*OPTIONS, "root"], prefix="config")
    least = {"steps": 2, "kills": 0, "every": 1, "seed": 0}
    options = {name: flag_value(own, name, default, least=least[name]) for name, default in OPTIONS.items()}
    config = parse_flags(rest)
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as temporary:
        root = pathlib.Path(own.get("root", temporary))
        root.mkdir(parents=True, exist_ok="root" not in own)
        found = verify(config, root, **options)
    if found:
        print("NOT EQUAL:\n  " + "\n  ".join(found))
        return 1
    print(
        f"equal bit for bit after {options['kills']} kill(s) on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
