"""Faults of a run, with real processes, signals and damaged files: train.py must go on as if nothing had happened."""

import ctypes
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sympow_jax import train as train_command
from sympow_jax.command_line import one_line_errors
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import unflatten
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.training.run_differences import differences
from tests.input_pipeline.stores import random_tokens, write_store

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 40
FLAGS = {
    "model.num_layers": 1, "model.embed_dim": 32, "model.num_heads": 2, "model.head_dim": 16, "model.mlp_dim": 64,
    "data.seq_len": 64, "data.batch_size": 2, "evaluation.every_steps": 20, "evaluation.num_batches": 2,
    "evaluation.lengths": "64", "checkpoint.every_steps": 5, "checkpoint.keep_last": 3, "logging.every_steps": 1,
    "logging.peak_flops": 1e12, "num_train_steps": STEPS,
}  # fmt: skip


SLOWLY = """
import time
from sympow_jax.train import main
from sympow_jax.input_pipeline.prefetch import Prefetch

take = Prefetch.__next__
def take_slowly(self):
    time.sleep(0.1)
    return take(self)
Prefetch.__next__ = take_slowly
main()
"""


def command(workdir: pathlib.Path, *more: str, **changes) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in (FLAGS | changes).items()]
    config = "--config=configs/quickstart.py:conformal_sympow"
    return [sys.executable, "train.py", config, f"--workdir={workdir}", *flags, *more]


def train(workdir: pathlib.Path, *more: str, limit: int | None = None, env: dict | None = None, **changes):
    """Runs train.py to its end; `limit` is the largest file it may write, in bytes."""

    def before():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        drop_capability = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: the modes of folders hold for root too
        ctypes.CDLL(None).prctl(*drop_capability, 0, 0, 0)

    return subprocess.run(
        command(workdir, *more, **changes),
        cwd=ROOT,
        env=plain_environment() | (env or {}),
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=600,
    )


def plain_environment() -> dict[str, str]:
    """This one, without the virtual devices of the test session."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def start(workdir: pathlib.Path, **changes) -> subprocess.Popen:
    """train.py, but a step takes at least 0.1 s, so that a signal meets the run where the test wants it."""
    python, _, *flags = command(workdir, **changes)
    return subprocess.Popen(
        [python, "-c", SLOWLY, *flags],
        cwd=ROOT,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(workdir: pathlib.Path) -> int:
    path = workdir / METRICS_NAME
    return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while True:
        ended = process.poll() is not None
        if last_step(workdir) >= step:
            return
        assert not ended, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoints(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in line, line


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, straight) -> pathlib.Path:
    """A run killed past step 22, with checkpoints 10 or later; to be copied."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with start(workdir) as process:
        wait_for_step(workdir, 22, process)
        process.kill()
        process.communicate()
    assert checkpoints(workdir)
    return workdir


@pytest.fixture
def workdir(stopped, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def assert_finishes_like(straight: pathlib.Path, workdir: pathlib.Path, *more: str, **changes) -> str:
    result = train(workdir, *more, **changes)
    assert result.returncode == 0, result.stderr
    assert differences(straight, workdir) == []
    return result.stderr


def test_killed_run_continues_bit_for_bit_and_a_finished_one_says_so(straight, workdir):
    assert_finishes_like(straight, workdir)
    assert [row["step"] for row in read_metrics(workdir / METRICS_NAME) if "loss" in row] == list(range(1, STEPS + 1))
    again = train(workdir)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert differences(straight, workdir) == []


@pytest.mark.parametrize("moment", ["before the first step", "evaluation", "last save"])
def test_kill_at_chosen_moments(straight, tmp_path, moment):
    workdir = tmp_path / "run"
    with start(workdir) as process:
        if moment == "before the first step":
            deadline = time.monotonic() + 300
            while not (workdir / "config.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            wait_for_step(workdir, {"evaluation": 20, "last save": STEPS}[moment], process)
        process.kill()
        process.communicate()
    assert_finishes_like(straight, workdir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_within_a_step(straight, tmp_path, number, code):
    workdir = tmp_path / "run"
    with start(workdir, **{"checkpoint.every_steps": 1000}) as process:
        wait_for_step(workdir, 3, process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    (saved,) = checkpoints(workdir)
    assert f"stopped at step {saved}" in output and last_step(workdir) == saved
    assert_finishes_like(straight, workdir)


def test_second_signal_ends_at_once_and_corrupts_nothing(straight, tmp_path):
    workdir = tmp_path / "run"
    with start(workdir) as process:
        wait_for_step(workdir, 12, process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode in (137, 143)  # 143: it had stopped before the second one arrived
    assert_finishes_like(straight, workdir)


def largest_file(step: pathlib.Path) -> pathlib.Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_byte(step: pathlib.Path) -> None:
    path = largest_file(step)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["flipped byte", "missing manifest"])
def test_damaged_newest_checkpoint_falls_back_loudly_and_strict_refuses(straight, workdir, how):
    newest = checkpoints(workdir)[-1]
    step = workdir / "checkpoints" / str(newest)
    if how == "flipped byte":
        flip_byte(step)
        assert_error(train(workdir, "--strict"), "no sound checkpoint", f"step {newest}:")
    else:
        shutil.rmtree(step / "manifest")
    errors = assert_finishes_like(straight, workdir)
    assert f"checkpoint step {newest}" in errors and "is damaged" in errors
    assert step.with_name(f"{newest}.damaged").is_dir()


def test_all_checkpoints_damaged_is_refused_with_a_list(workdir):
    steps = checkpoints(workdir)
    for step in steps:
        flip_byte(workdir / "checkpoints" / str(step))
    before = (workdir / METRICS_NAME).read_bytes()
    assert_error(train(workdir), "no sound checkpoint", *(f"step {step}:" for step in steps))
    assert checkpoints(workdir) == steps and (workdir / METRICS_NAME).read_bytes() == before


def test_a_closed_folder_and_a_full_disk_are_named_and_older_checkpoints_survive(straight, workdir):
    steps = checkpoints(workdir)
    workdir.parent.chmod(0o555)
    assert_error(train(workdir.parent / "new"), f"--workdir={workdir.parent}/new cannot be written (Permission")
    workdir.parent.chmod(0o755)
    (workdir / "checkpoints").chmod(0o555)
    started = time.monotonic()
    result = train(workdir)
    assert time.monotonic() - started < 240  # Orbax alone waits 300 s for a folder that it could not make
    assert_error(result, "saving step", "Permission denied", "fix the folder")
    assert "training continues" in result.stderr and checkpoints(workdir) == steps
    (workdir / "checkpoints").chmod(0o755)
    no_cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # its entries would be cut short as well
    result = train(workdir, limit=20_000, env=no_cache)  # metrics fit, checkpoints do not
    assert_error(result, "saving step", "free space")
    assert "training continues" in result.stderr
    assert checkpoints(workdir) == steps[-3:]  # those to be kept
    assert_finishes_like(straight, workdir)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, after an error
def test_one_flipped_byte_in_50_random_places_is_seen_before_the_first_step_or_harmless(stopped, tmp_path, rng):
    directory = pathlib.Path(shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints"))
    newest = checkpoints(stopped)[-1]
    files = sorted(path for path in (directory / str(newest)).rglob("*") if path.is_file())
    with Checkpointer(directory, read_only=True) as checkpointer:
        specs, _ = checkpointer.describe(newest)
        like = unflatten(specs)
        sound = checkpointer.restore(newest, like=like)
        seen = 0
        for _ in range(50):
            path = files[rng.integers(len(files))]
            content = path.read_bytes()
            place, damaged = int(rng.integers(len(content))), bytearray(content)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            restored = checkpointer.restore(like=like)
            path.write_bytes(content)
            seen += restored.step < newest
            if restored.step == newest:
                assert restored.metadata == sound.metadata, (path, place)
                same = jax.tree.map(
                    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored.tree, sound.tree
                )
                assert all(jax.tree.leaves(same)), (path, place)
    gc.collect()
    print(f"{seen} of 50 flipped bytes were seen, the others changed nothing that is read")
    assert seen >= 10


@pytest.mark.parametrize("how", ["token", "truncated", "missing"])
def test_damaged_training_data_is_named_and_stops_the_run(tmp_path, rng, how):
    tokens = random_tokens(rng, (32, 128))
    if how == "token":
        tokens[20, 3] = 999
    store = write_store(tmp_path / "train.zarr", tokens, chunks=(8, 128))
    chunk = store / "2.0"
    if how == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:-5])
    elif how == "missing":
        chunk.unlink()
    workdir = tmp_path / "run"
    result = train(workdir, **{"data.train": store, "data.heldout": "python-stdlib"})
    what = {"token": "holds token 999 at [20, 3]", "truncated": "is damaged", "missing": "chunks are missing (2.0)"}
    assert_error(result, str(store), what[how])
    assert (
        last_step(workdir) == {"token": 10, "truncated": 8, "missing": 0}[how]
    )  # the batches before it were trained on


def test_dead_metrics_sink_does_not_stop_training(straight, workdir):
    shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
    (workdir / "tensorboard").write_text("in the way")
    assert "TensorBoard cannot be written" in assert_finishes_like(straight, workdir)


def test_changed_config_is_refused_field_by_field_unless_it_may_change(stopped, workdir, capsys):
    for name, value in {"model.embed_dim": 48, "attention.degree": 4, "data.seq_len": 32, "seed": 1}.items():
        assert one_line_errors(train_command.run, command(workdir, **{name: value})[2:]) == 1
        printed = capsys.readouterr()
        assert f"config change: {name}: " in printed.out
        assert printed.err.startswith(f"error: {name}") and printed.err.count("\n") == 1
    assert one_line_errors(train_command.run, command(workdir, **{"optimizer.learning_rate": 1e-4})[2:]) == 1
    assert "--allow_learning_rate_change" in capsys.readouterr().err
    result = train(workdir, **{"checkpoint.every_steps": 7, "data.prefetch_batches": 2, "model.remat": "block"})
    assert result.returncode == 0, result.stderr
    assert "config change: checkpoint.every_steps: 5 -> 7" in result.stdout


def test_second_run_in_the_same_workdir_is_refused(straight, tmp_path):
    workdir = tmp_path / "run"
    with start(workdir) as first:
        wait_for_step(workdir, 2, first)
        first.send_signal(signal.SIGSTOP)  # it holds the lock and does not finish meanwhile
        try:
            assert_error(train(workdir), "in use by another run", f"pid {first.pid}")
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=300) == 0
        first.communicate()
    assert differences(straight, workdir) == []


def test_hostile_environment(straight, tmp_path):
    env = {"LC_ALL": "C", "TMPDIR": "/nowhere", "TZ": "Pacific/Kiritimati", "http_proxy": "http://127.0.0.1:9"}
    workdir = tmp_path / "run"
    result = train(workdir, env=env)
    assert result.returncode == 0, result.stderr
    assert differences(straight, workdir) == []


def test_weights_of_another_run_start_this_one_also_after_a_kill(straight, tmp_path):
    workdir = tmp_path / "run"
    changes = {"data.seq_len": 32, "attention.position": "rope", "num_train_steps": 3}
    first = train(workdir, f"--init_from={straight}:30", **changes)
    assert first.returncode == 0 and f"of {straight}, step 30" in first.stdout, first.stderr
    assert "layers/0/mixer/beta/kernel of the checkpoint is not used" in first.stdout
    losses = [row["loss"] for row in read_metrics(workdir / METRICS_NAME) if "loss" in row]
    trained = [row["loss"] for row in read_metrics(straight / METRICS_NAME) if "loss" in row]
    assert losses[0] < trained[10]
    shutil.rmtree(workdir / "checkpoints")  # as after a kill before the first one
    assert "step 30" in train(workdir, **changes).stdout
    assert losses == [row["loss"] for row in read_metrics(workdir / METRICS_NAME) if "loss" in row]


def test_config_json_is_data_and_never_run(workdir, tmp_path, capsys):
    marker = tmp_path / "ran"
    payload = f"__import__('os').system('touch {marker}')"
    for contents in (payload, json.dumps({"variant": payload}), json.dumps([payload])):
        (workdir / "config.json").write_text(contents)
        assert one_line_errors(train_command.run, command(workdir)[2:]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert not marker.exists()


def test_steps_that_are_not_finite_are_not_applied_and_stop_the_run(tmp_path):
    workdir = tmp_path / "run"
    flags = {"optimizer.learning_rate": 1e38, "optimizer.warmup_steps": 1, "optimizer.max_skipped_steps": 3}
    assert_error(train(workdir, **flags), "optimizer.max_skipped_steps = 3", "is not finite, and neither")
    rows = [row for row in read_metrics(workdir / METRICS_NAME) if "loss" in row]
    assert rows[-1]["skipped_in_a_row"] == 4 and rows[-1]["step"] < STEPS
    bad = [row for row in read_metrics(workdir / METRICS_NAME) if "not_applied" in row]
    assert [row["step"] for row in bad] == [row["step"] for row in rows if row["skipped_in_a_row"]]
    assert all(row["tensor"].startswith("gradients/") and row["documents"] and len(row["rows"]) == 2 for row in bad)
    norms = {row["param_norm"] for row in rows if row["skipped_in_a_row"] > 0}
    assert len(norms) == 1  # the parameters of the last good step
