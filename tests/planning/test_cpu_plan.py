"""Plans for this machine's CPU, where predictions can be checked."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from sympow_jax import config as config_lib
from sympow_jax import plan as command
from sympow_jax.models import flops
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.planning import compile as compile_lib
from sympow_jax.planning import hlo, report, targets, work
from sympow_jax.planning.compile import build, explain
from sympow_jax.planning.errors import PlanError
from sympow_jax.sharding import batch_sharding
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from tests.models.small import VOCAB, tiny_config

SMALL = [
    "--config=configs/quickstart.py", "--config.model.num_layers=2", "--config.model.embed_dim=128",
    "--config.model.num_heads=2", "--config.model.head_dim=64", "--config.model.mlp_dim=512",
    "--config.model.scan_layers=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    """As runs have it: optax mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def config(*flags):
    return config_lib.parse_flags([*SMALL, *flags])


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("softmax_rope", marks=pytest.mark.slow),
        pytest.param("conformal_sympow", marks=pytest.mark.slow),
        pytest.param("fox", marks=pytest.mark.slow),
    ],
)
def test_flops_agree_with_xla_where_it_can_count(variant):
    """Without loops XLA's own count is complete; the dense form also computes the masked half of the scores."""
    unrolled = config(
        f"--config.variant={variant}", "--config.attention.implementation=reference",
        "--config.model.scan_layers=false", "--config.data.seq_len=256", "--config.data.batch_size=4",
    )  # fmt: skip
    built = build(unrolled, 257, targets.find("cpu:1"))
    xla = built.train.compiler_flops
    counted = sum(work.flops(hlo.parse(built.train.text)).values())
    assert counted == pytest.approx(xla, rel=0.05)
    attention, rest = flops.train_flops_per_token(unrolled, built.params, 256)
    assert 4 * 256 * (2 * attention + rest) == pytest.approx(xla, rel=0.05)


def test_the_planned_step_is_the_one_that_is_trained(monkeypatch):
    """The program of a real state and batch, letter for letter; z_loss and outlier_ratio change it."""
    programs = []

    def record(step, arguments, *_):
        programs.append((step, arguments))
        return mock.Mock(spec=compile_lib.Step)

    monkeypatch.setattr(compile_lib, "_compile", record)
    flags = ("optimizer.z_loss=0.1", "optimizer.outlier_ratio=3.0", "model.num_layers=1", "mesh.data=1")
    for left_out in ((), ("z_loss",), ("outlier_ratio",)):
        settings = tiny_config("softmax_rope", *(f for f in flags if not any(name in f for name in left_out)))
        build(settings, VOCAB, targets.find("cpu:1"))
    steps = programs[::2]  # each is followed by the program of held-out loss
    planned, without_z_loss, without_outliers = (step.lower(*arguments).as_text() for step, arguments in steps)
    settings = tiny_config("softmax_rope", *flags)
    mesh = config_mesh(settings, jax.devices("cpu")[:1])
    model = Model(resolve_implementation(settings), VOCAB, mesh)
    tokens = jnp.zeros((settings.data.batch_size, settings.data.seq_len), jnp.int32, device=batch_sharding(mesh))
    trained = make_train_step(model).lower(create_train_state(model, 0), {"inputs": tokens, "targets": tokens})
    assert trained.as_text() == planned
    assert len({planned, without_z_loss, without_outliers}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--config.variant=conformal_sympow", "--config.data.seq_len=2048", "--config.data.batch_size=8",
         "--config.attention.implementation=chunked", "--config.attention.chunk_size=256"),
        ("--config.variant=softmax_rope", "--config.data.seq_len=1024", "--config.data.batch_size=32",
         "--config.model.remat=block"),
    ],
    ids=["conformal_sympow", "softmax_rope"],
)  # fmt: skip
def test_peak_memory_is_what_a_run_uses(flags):
    built = build(config(*flags), 257, targets.find("cpu:1"))
    done = subprocess.run(
        [sys.executable, "tests/planning/cpu_peak.py", *SMALL, *flags],
        env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = int(done.stdout.strip().splitlines()[-1])
    assert built.train.memory.total > 100e6, "too small to measure"
    print(f"predicted {built.train.memory.total / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert built.train.memory.total == pytest.approx(measured, rel=0.2)


@pytest.mark.slow
def test_the_command_writes_a_plan_and_a_matrix(tmp_path, capsys):
    flags = [*SMALL, "--config.data.seq_len=128", "--topology=cpu:1", "--variants=sympow,softmax_rope"]
    assert command.run([*flags, f"--output={tmp_path}/both"]) == 0
    plans = json.loads((tmp_path / "both.json").read_text())
    assert [p["variant"] for p in plans] == ["sympow", "softmax_rope"]
    assert all(p["status"] == "fits" and p["compiled_for"] == "cpu:1" for p in plans)
    first = plans[0]
    memory = first["memory"]["train"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["total"] == sum(memory[name] for name in ("parameters", "optimizer", "batch", "temporaries"))
    table = (tmp_path / "both.md").read_text()
    assert table.count("cpu:1") == 2 and "compiled for" in table
    assert "MFU" in capsys.readouterr().out


MESSAGES = [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (34.00G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        "memory",
        "needs 34.00 GiB of 15.75 GiB of device memory, 18.25 GiB too much; try --config.model.remat=block",
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "memory",
        "needs 20.50 GiB of 15.75 GiB",
    ),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 34.00G exceeds 15.75G", "memory", "18.25 GiB too much"),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", "kernel", "attention.chunk_size"),
    ("INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape cast", "kernel", "attention.implementation"),
    ("One of jit outputs was given the sharding of NamedSharding, which is not divisible", "sharding", "mesh.seq"),
    ("INTERNAL: something\nelse", "compiler", "INTERNAL: something else"),
]


@pytest.mark.parametrize(("text", "kind", "says"), MESSAGES)
def test_what_a_compiler_refuses_becomes_one_line(text, kind, says):
    target = targets.find("cpu:1")
    error = explain(text, config(), target)
    assert isinstance(error, PlanError)
    assert error.kind == kind
    assert says in str(error)
    assert "\n" not in str(error)
    plan = report.failure(config(), target, error)
    assert plan["status"] == ("does not fit" if kind == "memory" else f"{kind} error")
    assert str(error) in report.matrix([plan])


def test_an_internal_error_names_a_compiler_of_another_release(monkeypatch):
    monkeypatch.setattr("sympow_jax.planning.compile.mismatch", lambda platform: f"the one for {platform} is old")
    target = targets.find("cpu:1")
    error = explain("INTERNAL: RET_CHECK failure while partitioning", config(), target)
    assert error.kind == "compiler"
    assert "the one for cpu is old; INTERNAL: RET_CHECK" in str(error)
    assert report.failure(config(), target, error)["compiler"].startswith("jaxlib ")


def test_wrong_flags_are_one_line():
    for flags, says in ((["--list="], "no such flag|--list"), ([*SMALL], "--topology is missing")):
        with pytest.raises(config_lib.ConfigError, match=says):
            command.run(flags)


@pytest.mark.slow
def test_context_parallelism_sends_what_the_arithmetic_says():
    """ceil(log2 P) states of H P (Dv + 1) float32 numbers a layer and pass: forward, recomputed, backward."""
    shards, layers, heads, head_dim = 8, 2, 2, 64
    target = targets.find(f"cpu:{shards}")
    flags = ["--config.data.seq_len=2048", "--config.data.batch_size=1", f"--config.mesh.seq={shards}"]
    flags += ["--config.mesh.data=1", "--config.attention.implementation=chunked", "--config.model.remat=block"]
    flags += ["--config.model.scan_layers=true"]
    result = report.plan(build(config(*flags), 257, target), target)
    assert result["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "seq": shards}
    state = heads * math.comb(head_dim + 1, 2) * (head_dim + 1) * 4
    (sent,) = [c["bytes"] for c in result["collectives"] if (c["kind"], c["axis"]) == ("collective-permute", "seq")]
    assert sent / (3 * layers) == pytest.approx(math.ceil(math.log2(shards)) * state, rel=0.1)
