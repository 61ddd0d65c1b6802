"""What the compilers of GPUs give the fused kernels, against what is recorded."""

import importlib.util
import itertools
import json

import pytest

from benchmarks import gpu_kernels
from benchmarks import kernels as benchmark

RECORDED = json.loads((benchmark.ROOT / "docs" / "benchmarks" / "kernels.json").read_text())["kernels"]


def rows(target: str, size: str) -> dict[str, dict]:
    wanted = (target, size, "bfloat16")
    return {r["kernel"]: r for r in RECORDED if (r["target"], r["size"], r.get("inputs")) == wanted}


def test_what_is_recorded_spills_nothing_and_moves_little():
    for target, size in itertools.product(gpu_kernels.TARGETS, gpu_kernels.SIZES):
        assert [r["spilled_bytes"] for r in rows(target, size).values()] == [0] * 5
    trained = rows("h100", "64/64")
    moved = {name: r["bytes_per_token_and_head"] for name, r in trained.items()}
    assert sum(moved.values()) + moved["states"] <= 10_000  # backward makes the states again


def test_resources_are_read_from_what_the_compiler_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_ptxas", lambda: str(tmp_path / "ptxas"))
    said = "0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\\nUsed 99 registers, used 1 barriers"
    (tmp_path / "ptxas").write_text(f"#!/bin/sh\nprintf '{said}' >&2\n")
    (tmp_path / "ptxas").chmod(0o700)
    line = "012: kCustomKernel linear_attention_forward_1 grid: [33] threads: [128]  shared_memory: 33024 bytes\n"
    (tmp_path / "a.thunk_sequence.txt").write_text("001: kCustomKernel loop grid: [1] shared_memory: 7 bytes\n" + line)
    (tmp_path / "a.1.ptx").write_text(".target sm_90a\n.visible .entry linear_attention_forward_1(\n")
    (tmp_path / "a.2.ptx").write_text(".target sm_90a\n.visible .entry loop(\n")
    found = {"forward": {"registers": 99, "spilled_bytes": 8, "shared_bytes": 33024}}
    assert gpu_kernels.resources(tmp_path) == found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no compiler of GPUs is installed")
@pytest.mark.parametrize(("target", "size"), [("h100", "64/64"), ("a100", "128/128")])
def test_no_kernel_takes_more_than_recorded(target, size):
    for found in benchmark.run("all", target, size, "bfloat16"):
        recorded = rows(target, size)[found["kernel"]]
        assert found["spilled_bytes"] == 0 and found["registers"] <= recorded["registers"] + 16
        assert found["bytes_per_token_and_head"] <= recorded["bytes_per_token_and_head"]
