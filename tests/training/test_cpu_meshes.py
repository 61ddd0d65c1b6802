"""Runs on meshes of virtual CPU devices end, with the losses and digests of one device."""

import pytest

from benchmarks.cpu_meshes import study


@pytest.mark.slow
def test_runs_on_cpu_meshes_save_resume_and_agree_with_one_device(capfd):
    """Axes that cut the parameters; `python -m benchmarks.cpu_meshes` tries all, ten times each."""
    faults = study([2], ["fsdp", "tensor"], runs=1) + study([8], ["fsdp"], runs=1)
    assert faults == 0, capfd.readouterr().out
