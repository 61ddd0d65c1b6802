"""Runs on meshes of virtual CPU devices end, with the losses and digests of one device."""

import pytest

from benchmarks.cpu_meshes import study


@pytest.mark.slow
def test_a_run_on_a_cpu_mesh_saves_resumes_and_agrees_with_one_device(capfd):
    """One that cuts the parameters; `python -m benchmarks.cpu_meshes` tries all axes on 2 and 8, ten times each."""
    faults = study([2], ["fsdp"], runs=1)
    assert faults == 0, capfd.readouterr().out
