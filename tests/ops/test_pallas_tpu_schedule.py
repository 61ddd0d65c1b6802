"""The compiler's static schedule of the TPU kernels against the recorded one."""

import importlib.util
import json

import pytest

from benchmarks import kernels as benchmark

RECORDED = json.loads((benchmark.ROOT / "docs" / "benchmarks" / "kernels.json").read_text())["kernels"]
ALLOWED = 1.05


def test_what_is_recorded_meets_what_the_kernels_were_built_for():
    rows = {(r["kernel"], r["size"]): r for r in RECORDED if r["target"] == "v5e"}
    backward = [rows[f"backward_{part}", "64/64"]["bundles_per_512"] for part in ("queries", "keys")]
    assert rows["forward", "64/64"]["bundles_per_512"] <= 4700 and sum(backward) <= 11500
    trained = [rows[kernel, "64/128"] for kernel in ("forward", "backward_queries", "backward_keys")]
    useful = sum(r["useful_share"] * r["bundles_per_512"] for r in trained)
    assert useful / sum(r["bundles_per_512"] for r in trained) >= 0.55


def test_bundles_are_read_from_the_schedule(tmp_path):
    text = "== CAPACITY:\nMXU, XLU\n    4     3\n== UTILIZATION:\n4 0\n0 3\n2 1\n"
    (tmp_path / "1-final_hlo-static-per-bundle-utilization.txt").write_text(text)
    (tmp_path / "0-final_hlo-static-per-bundle-utilization.txt").write_text(text.replace("4 0\n0 3\n", ""))
    assert benchmark.bundles(tmp_path) == (3, 0.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys", "state", "state_backward"])
def test_no_kernel_takes_more_bundles_than_recorded(kernel):
    (recorded,) = (r for r in RECORDED if (r["kernel"], r["target"], r["size"]) == (kernel, "v5e", "64/64"))
    (found,) = benchmark.run(kernel, "v5e", "64/64", "bfloat16")
    assert found["bundles_per_512"] <= ALLOWED * recorded["bundles_per_512"]
    assert found["bytes_per_token_and_head"] <= ALLOWED * recorded["bytes_per_token_and_head"]
