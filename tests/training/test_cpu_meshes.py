"""Runs on meshes of virtual CPU devices end, with the losses and digests of one device."""

import sys

import numpy as np
import pytest

from benchmarks import cpu_meshes
from benchmarks.cpu_meshes import METRICS_NAME, RESUMED, study
from sympow_jax.training.checkpoint import Checkpointer

LOSSES = '{"step": 1, "loss": 2.0}\n'


@pytest.fixture
def runs(monkeypatch):
    """Runs that are written here instead of trained; `damage(workdir)` is called at the end of each."""
    damages = {}

    def train(workdir, processes, devices, steps, **mesh):
        cpu_meshes.said(workdir).mkdir(exist_ok=True)
        if steps == RESUMED:
            with Checkpointer(workdir / "checkpoints", keep_last=9) as checkpointer:
                for step in range(2, RESUMED + 1, 2):
                    checkpointer.save(step, {"x": np.full(2, step)}, metadata={})
            (workdir / METRICS_NAME).write_text(LOSSES)
            damages.get(workdir.name, lambda _: None)(workdir)
        return ""

    monkeypatch.setattr(cpu_meshes, "train", train)
    return damages


def test_every_fault_is_a_line_and_its_workdir_is_kept(runs, tmp_path, capsys, caplog):
    manifest = f"checkpoints/{RESUMED}/manifest/metadata"
    runs["fsdp2x4-0"] = lambda workdir: (workdir / METRICS_NAME).unlink()
    runs["fsdp2x4-2"] = lambda workdir: (workdir / manifest).write_text("{")
    runs["tensor2x4-1"] = lambda workdir: (workdir / METRICS_NAME).write_text(LOSSES.replace("2.0", "2.1"))
    assert study(["2x4"], ["fsdp", "tensor"], 3, tmp_path) == 3
    lines = capsys.readouterr().out.splitlines()
    begins = [
        "1 arrays",
        "fsdp2x4-0: ",
        "fsdp2x4-2: CheckpointError: ",
        "fsdp 2x4: 1 of 3 sound",
        "tensor2x4-1: losses",
    ]
    assert len(lines) == 6 and all(line.startswith(begin) for line, begin in zip(lines, begins, strict=False)), lines
    kept = {"one", "fsdp2x4-0", "fsdp2x4-2", "tensor2x4-1"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {f"{name}.said" for name in kept}


@pytest.mark.parametrize("flag", ["--runs=0", "--devices=2x3x4", "--devices=8,x4", "--devices=0", "--axes=fsdp,pipe"])
def test_what_cannot_be_tried_is_refused(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu_meshes", flag])
    with pytest.raises(SystemExit, match="2"):
        cpu_meshes.main()
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_run_on_a_cpu_mesh_saves_resumes_and_agrees_with_one_device(capfd):
    """Two processes that cut the parameters; `python -m benchmarks.cpu_meshes` tries all axes, many times."""
    faults = study(["2x2"], ["fsdp"], runs=1)
    assert faults == 0, capfd.readouterr().out
