"""A run on any mesh, in any number of processes, has the loss curve of one device."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.models.model import Model
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from tests.input_pipeline.stores import random_tokens, write_store
from tests.models.small import ROOT, VOCAB, tiny_config
from tests.models.test_model_options import FAMILIES
from tests.training.test_processes import finish, free_port

pytestmark = [pytest.mark.slow, pytest.mark.quick]

STEPS = 10
MESHES = {
    "data": ("mesh.data=8",),
    "fsdp": ("mesh.data=1", "mesh.fsdp=8"),
    "tensor": ("mesh.data=1", "mesh.tensor=2"),
    "seq": ("mesh.data=1", "mesh.seq=4"),
    "mixed": ("mesh.fsdp=2", "mesh.tensor=2", "mesh.seq=2"),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss_curve(variant: str, *flags: str) -> list[float]:
    config = tiny_config(
        variant, "data.seq_len=32", "data.batch_size=8", "attention.implementation=blockwise",
        "optimizer.warmup_steps=2", f"num_train_steps={STEPS}", *flags,
    )  # fmt: skip
    mesh = config_mesh(config)
    model = Model(config, VOCAB, mesh)
    step = make_train_step(model)
    state, rng, losses = create_train_state(model, 0), np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCAB, (2, 8, 32), np.int32)
        batch = jax.device_put(dict(zip(("inputs", "targets"), tokens, strict=True)), sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
    assert step._cache_size() == 1  # pyright: ignore: one compilation a run
    return losses


@pytest.mark.parametrize("variant", ["softmax_fire", "hybrid", "based"])  # the hybrid has the other kinds of layers
def test_every_mesh_has_the_loss_curve_of_one_device(variant):
    want = loss_curve(variant, "mesh.data=1")
    assert max(want) - min(want) > 1e-2
    for name, flags in MESHES.items():
        np.testing.assert_allclose(loss_curve(variant, *flags), want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", ["everything-sandwiched", "olmo2"])
def test_options_of_a_model_have_the_loss_curve_of_one_device(family):
    variant, *options = FAMILIES[family]
    want = loss_curve(variant, *options, "mesh.data=1")
    assert max(want) - min(want) > 1e-2
    np.testing.assert_allclose(loss_curve(variant, *options, *MESHES["mixed"]), want, rtol=1e-5)


def test_a_mesh_keeps_accumulation_and_remat():
    want = loss_curve("conformal_sympow", "mesh.data=1")
    flags = ("mesh.data=2", "mesh.seq=2", "optimizer.accumulation_steps=2", "model.remat=block")
    np.testing.assert_allclose(loss_curve("conformal_sympow", *flags), want, rtol=1e-5)


def command(variant: str, workdir, *flags: str) -> list[str]:
    sizes = {
        "num_train_steps": STEPS, "model.num_layers": 2, "model.scan_layers": "true", "model.embed_dim": 32,
        "model.num_heads": 2, "model.head_dim": 16, "model.mlp_dim": 48, "data.seq_len": 32, "data.batch_size": 8,
        "evaluation.lengths": 32, "evaluation.num_batches": 2, "logging.every_steps": 1, "logging.tensorboard": "false",
        "optimizer.warmup_steps": 2,
    }  # fmt: skip
    values = [f"--config.{name}={value}" for name, value in sizes.items()] + [f"--config.{flag}" for flag in flags]
    return [
        sys.executable, "train.py", f"--config=configs/quickstart.py:{variant}", f"--workdir={workdir}", *values,
    ]  # fmt: skip


def losses_of(workdir) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row} | {
        -row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row
    }


def run_processes(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    processes = [
        subprocess.Popen(command, env=base | environment, **pipes)
        for command, environment in zip(commands, environments, strict=True)
    ]
    finish(processes)


def flags_of(count: int) -> list[list[str]]:
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [[address, f"--num_processes={count}", f"--process_id={index}"] for index in range(count)]


@pytest.mark.parametrize(
    ("variant", "count", "devices", "mesh"),
    [
        ("conformal_sympow", 2, 2, ("mesh.data=1", "mesh.seq=4")),  # the sequence spans both processes
        ("softmax_fire", 4, 1, ("mesh.fsdp=2", "mesh.seq=2", "mesh.data=1")),
    ],
)
def test_processes_have_the_loss_curve_of_one(tmp_path, variant, count, devices, mesh, rng):
    """The held-out loss too, of 15 sequences that two batches of 8 hold with one of them repeated."""
    heldout = write_store(tmp_path / "heldout", random_tokens(rng, (3, 160)), chunks=(3, 160))
    mesh = (*mesh, f"data.heldout={heldout}")
    many = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    commands = [command(variant, tmp_path / "many", *mesh) + flags for flags in flags_of(count)]
    run_processes(commands, [many] * count)
    run_processes([command(variant, tmp_path / "one", "mesh.data=1", mesh[-1])], [{}])
    got, want = losses_of(tmp_path / "many"), losses_of(tmp_path / "one")
    assert [row["heldout_tokens"] for row in read_metrics(tmp_path / "many" / METRICS_NAME)[STEPS:]] == [15 * 32]
    assert sorted(got) == sorted(want) and len(got) == STEPS + 1
    np.testing.assert_allclose([got[step] for step in sorted(got)], [want[step] for step in sorted(want)], rtol=1e-5)


def test_processes_find_each_other_through_their_launcher(tmp_path):
    """As mpirun starts them; a resumed run may have another mesh."""
    number = os.getpid() % 4096  # JAX takes port 61,440 + the number of the job
    job = {"OMPI_MCA_orte_hnp_uri": f"{number << 12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    ranks = [job | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(2)]
    run_processes([command("softmax_nope", tmp_path / "run", "num_train_steps=2")] * 2, ranks)
    run_processes([command("softmax_nope", tmp_path / "run", "num_train_steps=3", "mesh.data=1")], [{}])
    assert sorted(losses_of(tmp_path / "run")) == [-3, -2, 1, 2, 3]


@pytest.mark.parametrize(
    ("folders", "flags", "want"),
    [
        (
            ("run", "run"),
            ("optimizer.learning_rate=0.001",),
            r"optimizer\.learning_rate: 0\.005 in process 0, 0\.001 in ",
        ),
        (
            ("run", "else"),
            (),
            r"--workdir=\S+: process 1 \(host \S+\) does not see what process 0 \(\S+\) writes there",
        ),
    ],
)
def test_processes_that_do_not_belong_together_say_so_and_write_nothing(tmp_path, folders, flags, want):
    """Other flags in one of them, or a workdir that is not one folder."""
    commands = [
        command("softmax_nope", tmp_path / folder, *more) + places
        for folder, more, places in zip(folders, ((), flags), flags_of(2), strict=True)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    said = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    errors = [[line for line in lines if not line.startswith("waiting ")] for lines in said]  # of a slow machine
    assert [process.returncode for process in processes] == [1, 1]
    assert all(re.match("error: " + want, lines[-1]) and len(lines) == 1 for lines in errors), errors
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
