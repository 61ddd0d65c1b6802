"""Whole parameters and optimizer states never exist in one process of a sharded run."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sympow_jax.training import verified_read
from sympow_jax.training.checkpoint import Checkpointer
from tests.models.small import ROOT
from tests.training.test_sharded_training import free_port

SHARE = 0.35  # of all parameters and optimizer states; an eighth is the process's own


def peaks(count: int, *phases: str) -> list[dict]:
    """Of each process: bytes of the whole, and of the peak in each phase."""
    place, port = [sys.executable, "tests/training/peak_of_process.py"], str(free_port())
    commands = [[*place, port, str(count), str(index), *phases] for index in range(count)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert not any(process.returncode for process in processes), outputs[0][1][-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
def test_a_process_of_eight_never_holds_a_third_of_the_model(tmp_path):
    """Created, saved, and restored and evaluated from a checkpoint that one process wrote whole."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    peaks(1, "create", f"save={whole}")
    for found in peaks(8, "create", f"save={parts}", f"restore={whole}", "evaluate"):
        shares = {phase: peak / found["whole"] for phase, peak in found["peaks"].items()}
        assert max(shares.values()) < SHARE, shares


def test_a_restore_reads_a_sixteenth_at_a_time(tmp_path, monkeypatch):
    """Orbax holds what it reads beside the arrays: all of it, where there are cores and files enough."""
    tree = {"params": {f"{n:02}": np.full(1 + n % 7, n, np.float32) for n in range(60)} | {"whole": np.ones(99)}}
    most, sizes, read = sum(x.nbytes for x in tree["params"].values()) // 16, [], verified_read._read_group
    monkeypatch.setattr(verified_read, "_LEAST_GROUP", 1)
    monkeypatch.setattr(
        verified_read,
        "_read_group",
        lambda orbax, folder, wanted: (
            sizes.append([leaf.nbytes for leaf in wanted.values()]) or read(orbax, folder, wanted)
        ),
    )
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, tree, metadata={}, force=True)
        found = checkpointer.restore(1, like=tree).tree
    assert jax.tree.all(jax.tree.map(np.array_equal, found, tree))
    assert all(len(group) == 1 or sum(group) <= most for group in sizes)
    assert len(sizes) <= 2 * 16 + 1 and sum(map(len, sizes)) == 61
