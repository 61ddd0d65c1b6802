"""The proof that kills do no harm, and what it would report where they did."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.local_processes import LocalProcesses
from sympow_jax.training.quiet_orbax import TEMPORARY
from sympow_jax.training.run_differences import largest_difference
from sympow_jax.verify_resume import _faults_of_checkpoints, _faults_of_ends, _unfinished
from tests.training.test_faults import FLAGS, ROOT, plain_environment

END = "import sys, time; place = sys.argv[-1]; print(sys.argv[1], file=sys.stderr, flush=True); "


def ends(folder, line: str, body: str) -> tuple[LocalProcesses, list]:
    """Two processes that say `line`; process 1 is killed as it waits, and the other has run `body`."""
    body += "; time.sleep(60 * (place == '--process_id=1'))"
    processes = LocalProcesses([sys.executable, "-c", END + body, line], 2, folder)
    with processes:
        while not all(processes.errors(index) for index in range(2)):
            pass
        processes.kill(1)
        return processes, processes.wait(1.0)


@pytest.mark.parametrize(
    ("line", "body", "want"),
    [
        ("step 1/2  loss 3\nerror: process 1 has gone", "place[-1] == '0' and sys.exit(1)", ""),
        ("error: process 1 has gone", "pass", "process 0 exited with 0"),
        ("error: process 1 has gone", "time.sleep(60)", "process 0 still runs"),
        ("error: something else", "place[-1] == '0' and sys.exit(1)", "process 0 exited with 1: ['error: something"),
        ("error: process 1\nmore", "place[-1] == '0' and sys.exit(1)", "process 0 exited with 1: ['error: process 1',"),
    ],
)
def test_processes_that_do_not_end_in_one_line_are_named(tmp_path, line, body, want):
    processes, codes = ends(tmp_path, line, body)
    assert codes[1] == -signal.SIGKILL
    found = _faults_of_ends(processes, codes, victim=1)
    assert len(found) == bool(want) and all(fault.startswith(want) for fault in found)


def test_checkpoints_that_are_gone_or_damaged_are_named(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep_last=9) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": np.full(8, step, np.float32)}, metadata={})
    assert _faults_of_checkpoints(tmp_path, [1, 2], [1, 2]) == []
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").write_text("{")
    gone, damaged = _faults_of_checkpoints(tmp_path, [1, 2, 3], [1, 2])
    assert gone == "checkpoint 3 is gone" and "step 2" in damaged


def test_a_save_under_way_is_neither_a_deletion_nor_a_probe(tmp_path):
    for name in ("2", "4.deleted", "6", "8.probe.1"):
        (tmp_path / "checkpoints" / f"{name}{TEMPORARY if name != '2' else ''}").mkdir(parents=True)
    assert _unfinished(tmp_path) == {f"6{TEMPORARY}"}


def test_the_largest_difference_is_that_of_any_loss(tmp_path):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0, "tokens_per_sec": 1.0}, {"step": 2, "heldout_loss": 3.0}]
    for name, scale in (("a", 1.0), ("b", 1.5)):
        changed = [rows[0], rows[1] | {"tokens_per_sec": scale}, {"step": 2, "heldout_loss": 3.0 * scale}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert largest_difference(tmp_path / "a", tmp_path / "a") == 0.0
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0.5
    not_finite = [rows[0], rows[1] | {"loss": None}, rows[2]]
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in not_finite))
    assert largest_difference(tmp_path / "a", tmp_path / "b") == float("inf")
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert largest_difference(tmp_path / "a", tmp_path / "b") == float("inf")


@pytest.mark.slow
def test_the_proof_holds_for_two_processes_and_then_one():
    changes = FLAGS | {"data.batch_size": 4, "evaluation.every_steps": 4}
    flags = [f"--config.{name}={value}" for name, value in changes.items() if name != "num_train_steps"]
    own = ["--steps=8", "--kills=1", "--every=2", "--processes=2,1", "--heartbeat_seconds=5"]
    command = [sys.executable, "-m", "sympow_jax.verify_resume", "--config=configs/quickstart.py:conformal_sympow"]
    done = subprocess.run([*command, *flags, *own], env=plain_environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "equal within 1e-06, in 2 and 1 processes, after 1 kill(s)" in done.stdout
