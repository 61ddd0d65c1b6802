"""Runs on meshes of virtual CPU devices end, with the losses and digests of one device."""

import pytest

from benchmarks.cpu_meshes import study


@pytest.mark.slow
def test_a_run_on_a_cpu_mesh_saves_resumes_and_agrees_with_one_device(capfd):
    """Two processes that cut the parameters; `python -m benchmarks.cpu_meshes` tries all axes, many times."""
    faults = study(["2x2"], ["fsdp"], runs=1)
    assert faults == 0, capfd.readouterr().out
