"""Evaluations by several processes: the numbers of one device, written once, and one line where they disagree."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.evals.files import plain, read_npz, write_json
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.files import read_json
from sympow_jax.loading import load_step
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.typing import PyTree
from tests.evals.test_evaluation_meshes import LINEAR
from tests.evals.toy import CountedStore, make_store
from tests.generation.test_decoding_meshes import PROMPT, greedy
from tests.models.small import ROOT, VOCAB, moved, tiny_config
from tests.training.test_processes import finish, start
from tests.training.test_sharded_training import command, flags_of, run_processes

pytestmark = pytest.mark.slow


VARIANTS = ("softmax_rope", "softmax_fire", "fox", "conformal_sympow", "based")
MESHES = {1: {"fsdp": 4, "tensor": 2}, 2: {"fsdp": 2, "tensor": 2}, 4: {"data": 2, "seq": 2}}  # by processes

MEASURE = """
from sympow_jax.command_line import use_compilation_cache
from tests.training.test_process_evaluation import measure_all

use_compilation_cache()
jax.config.update("jax_disable_most_optimizations", True)
with watch():
    measure_all(directory, count, int(sys.argv[5]))
print("measured")
"""


def measure(directory, variant: str, step: int, sizes: dict[str, int]) -> tuple[PyTree, dict]:
    """The parameters of a step on a mesh of these sizes, and what they make of documents and of a prompt."""
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes)
    model, params, _ = load_step(f"{directory}/{variant}", step, mesh=mesh)
    store = CountedStore(**vars(make_store(num_documents=5, length=60, vocab=VOCAB - 1)))
    options = {"lengths": [24, 60], "train_length": 24, "num_targets": 12, "num_documents": 5}
    result, _ = length_generalisation(model, params, store, chunk_size=16, batch_size=2, **options)
    text = greedy(model, params, np.concatenate([PROMPT, PROMPT[:, ::-1]]), 64).tolist()
    return params, {"result": result, "text": text, "rows_read": store.rows_read}


def measure_all(directory, count: int, step: int) -> None:
    """Measures `step` of each variant as one of `count` processes, and writes the next step."""
    for variant in VARIANTS:
        params, found = measure(directory, variant, step, MESHES[count])
        with Checkpointer(f"{directory}/{variant}/checkpoints", keep_last=9) as checkpointer:
            checkpointer.save(step + 1, {"params": params}, metadata={})
        write_json(f"{directory}/{variant}/{count}.{jax.process_index()}.json", found)


def assert_same_numbers(found, want, *, atol: float = 0.0) -> None:
    """Within 1e-6 of each other, relative; of differences of losses, relative to the losses."""
    if isinstance(want, dict):
        assert found.keys() == want.keys()
        for name, value in want.items():
            of_differences = name in ("same_target_change", "gained_from_context")
            assert_same_numbers(found[name], value, atol=1e-5 if of_differences else atol)
    elif isinstance(want, list):
        assert len(found) == len(want)
        for one, other in zip(found, want, strict=True):
            assert_same_numbers(one, other, atol=atol)
    else:
        assert found == (pytest.approx(want, rel=1e-6, abs=atol) if isinstance(want, float) else want)


def test_any_number_of_processes_measures_what_one_device_does(tmp_path):
    """Numbers and text of every checkpoint: one mesh writes it, the next measures it and writes it again."""
    for variant in VARIANTS:
        form = ("attention.implementation=chunked",) if variant in LINEAR else ()
        config = resolve_implementation(tiny_config(variant, "model.tied_embeddings=false", *form))
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | MESHES[1])
        params = moved(Model(config, VOCAB).init(jax.random.key(0)), 0.1)
        workdir = tmp_path / variant
        write_json(workdir / "config.json", dataclasses.asdict(config))
        write_json(workdir / "data.json", {"vocab_size": VOCAB})
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
            checkpointer.save(1, {"params": placed}, metadata={})
    assert finish(start(MEASURE, tmp_path, 1, count=4, devices=1)) == ["measured"] * 4
    assert finish(start(MEASURE, tmp_path, 2)) == ["measured"] * 2
    for variant in VARIANTS:
        _, want = measure(tmp_path, variant, 3, {})
        assert len(np.unique(want["text"])) > 4
        for count, blocks in {4: [[0, 1, 4], [0, 1, 4], [2, 3], [2, 3]], 2: [[0, 1, 4], [2, 3]]}.items():
            for index, rows in enumerate(blocks):
                found = read_json(tmp_path / variant / f"{count}.{index}.json")
                assert found["text"] == want["text"] and found["rows_read"] == rows
                assert_same_numbers(found["result"], plain(want["result"]))
        with Checkpointer(tmp_path / variant / "checkpoints", read_only=True) as checkpointer:
            assert len({checkpointer.digest(step) for step in (1, 2, 3)}) == 1


def eval_command(workdir, name: str, *flags: str) -> list[str]:
    return [sys.executable, "eval.py", f"--workdir={workdir}", f"--name={name}", "--num_documents=3", *flags]


def together(count: int, devices: int, command: list[str]) -> None:
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    run_processes([command + place for place in flags_of(count)], [environment] * count)


def test_commands_in_processes_measure_what_one_device_does(tmp_path):
    """While they train, and after it as more of them on another mesh."""
    run = tmp_path / "run"
    flags = ("num_train_steps=2", "evaluation.lengths=32,100", "evaluation.contextwise_length=100", "mesh.data=1")
    flags = (*flags, "mesh.fsdp=2", "mesh.seq=2", "evaluation.num_documents=3")
    together(2, 2, command("conformal_sympow", run, *flags))
    together(4, 1, eval_command(run, "four", "--mesh.data=2", "--mesh.tensor=2"))
    run_processes([eval_command(run, "one")], [{}])
    together(2, 2, eval_command(run, "two_remember", "--remembrance"))
    run_processes([eval_command(run, "one_remembers", "--remembrance")], [{}])
    _check_text(run)
    want = read_npz(run / "eval" / "one.npz")
    _check_sums(run, "four", want)
    _check_sums(run, "two_remember", read_npz(run / "eval" / "one_remembers.npz"))
    row = read_metrics(run / METRICS_NAME)[-1]
    edges, sums = want["bin_edges"], want["bin_sums"].sum(axis=0)
    octaves = [0, *sorted(int(name.partition("/")[2]) for name in row if name.startswith("contextwise/"))]
    assert octaves[-2:] == [64, 100]
    for first, stop in itertools.pairwise(octaves):
        mean = sums[(edges[:-1] >= first) & (edges[1:] <= stop)].sum() / (3 * (stop - first))
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
