"""Evaluations by several processes: the numbers of one device, written once, and one line where they disagree."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from sympow_jax.evals.files import read_npz
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from tests.models.small import ROOT
from tests.training.test_sharded_training import command, flags_of, run_processes

pytestmark = pytest.mark.slow


def eval_command(workdir, name: str, *flags: str) -> list[str]:
    return [sys.executable, "eval.py", f"--workdir={workdir}", f"--name={name}", "--num_documents=3", *flags]


def together(count: int, devices: int, command: list[str]) -> None:
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    run_processes([command + place for place in flags_of(count)], [environment] * count)


def test_processes_measure_what_one_device_does(tmp_path):
    """While they train, after it on the run's mesh, and as more of them on another one."""
    run = tmp_path / "run"
    flags = ("num_train_steps=2", "evaluation.lengths=32,100", "evaluation.contextwise_length=100", "mesh.data=1")
    flags = (*flags, "mesh.fsdp=2", "mesh.seq=2", "evaluation.num_documents=3")
    together(2, 2, command("conformal_sympow", run, *flags))
    together(2, 2, eval_command(run, "two"))
    together(4, 1, eval_command(run, "four", "--mesh.data=2", "--mesh.tensor=2"))
    run_processes([eval_command(run, "one")], [{}])
    together(2, 2, eval_command(run, "two_remember", "--remembrance"))
    run_processes([eval_command(run, "one_remembers", "--remembrance")], [{}])
    _check_text(run)
    want = read_npz(run / "eval" / "one.npz")
    for name in ("two", "four"):
        _check_sums(run, name, want)
    _check_sums(run, "two_remember", read_npz(run / "eval" / "one_remembers.npz"))
    row = read_metrics(run / METRICS_NAME)[-1]
    edges, sums = want["bin_edges"], want["bin_sums"].sum(axis=0)
    octaves = [0, *sorted(int(name.partition("/")[2]) for name in row if name.startswith("contextwise/"))]
    assert octaves[-2:] == [64, 100]
    for start, stop in itertools.pairwise(octaves):
        mean = sums[(edges[:-1] >= start) & (edges[1:] <= stop)].sum() / (3 * (stop - start))
        assert row[f"contextwise/{stop}"] == pytest.approx(mean, rel=1e-6)


def _check_sums(run, name: str, want: dict[str, np.ndarray]) -> None:
    found = read_npz(run / "eval" / f"{name}.npz")
    for key, array in want.items():
        if key.endswith(("_sums", "_norms")):
            atol = 1e-4 if key == "variation_sums" else 0  # of differences of probabilities, over 50 targets
            np.testing.assert_allclose(found[key], array, rtol=1e-6, atol=atol, err_msg=f"{name} {key}")
        else:
            np.testing.assert_array_equal(found[key], array)


def _check_text(run) -> None:
    """Greedy text of 64 tokens, on the run's mesh and on one device, and the state that it leaves behind."""
    flags = ("--prompt=import os", "--max_new_tokens=64", "--temperature=0")
    command = [sys.executable, "-m", "sympow_jax.generate", f"--workdir={run}", *flags]
    together(2, 2, [*command, f"--save_state={run}/two"])
    run_processes([[*command, f"--save_state={run}/one"]], [{}])
    one, two = (read_npz(run / name / "state.npz") for name in ("one", "two"))
    texts = [json.loads((run / name / "state.json").read_text())["recent"] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0][0]) == 64
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_processes_that_are_asked_otherwise_say_so_and_write_nothing(tmp_path):
    run = tmp_path / "run"
    run_processes([command("softmax_nope", run, "num_train_steps=1", "mesh.data=1")], [{}])
    commands = [
        eval_command(run, "x", f"--lengths={length}") + place
        for length, place in zip((16, 32), flags_of(2), strict=True)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    errors = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all(re.match(r"error: --lengths: \[16\] in process 0, \[32\] in process 1", each[-1]) for each in errors)
    assert not (run / "eval").exists()
