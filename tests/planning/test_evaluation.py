"""Plans of evaluations: what a device holds at each length."""

import jax
import pytest

from sympow_jax import plan as command
from sympow_jax.files import read_json
from sympow_jax.planning import targets
from sympow_jax.planning.evaluation import plan_evaluation
from tests.models.small import VOCAB, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.quick]


def entries(variant: str, *flags: str) -> list[dict]:
    config = tiny_config(variant, "evaluation.lengths=32,64,256", "evaluation.chunk_size=32", *flags)
    return plan_evaluation(config, VOCAB, targets.find("cpu:8"))["evaluations"]


def test_a_stream_costs_the_same_at_every_length_and_a_window_does_not():
    stream = entries("conformal_sympow", "attention.implementation=chunked")
    assert [entry["tokens"] for entry in stream] == [32, 32, 32]
    assert stream[1]["memory"] == stream[2]["memory"] and stream[1]["memory"]["state"] > 1000
    assert stream[0]["memory"]["state"] < stream[1]["memory"]["state"] / 10  # one call, which keeps none
    window = entries("softmax_rope")
    assert [(entry["windows"], entry["tokens"]) for entry in window[::2]] == [(48, 32), (8, 256)]
    assert window[2]["memory"]["total"] > window[0]["memory"]["total"]


def test_the_axes_cut_parameters_states_and_windows():
    whole = entries("conformal_sympow", "attention.implementation=chunked")[1]["memory"]
    cut = entries("conformal_sympow", "attention.implementation=chunked", "mesh.fsdp=4", "mesh.tensor=2")[1]["memory"]
    assert cut["parameters"] < 0.2 * whole["parameters"]  # norms are whole everywhere
    assert cut["state"] == pytest.approx(whole["state"] * 8 / 6 / 2, rel=0.01)  # 8 rows for 6, half of the heads
    shards = entries("softmax_rope", "mesh.data=1", "mesh.seq=8")[2]
    assert (shards["windows"], shards["tokens"]) == (8, 256)


def test_the_command_writes_the_plan_and_fails_where_a_length_does_not_fit(tmp_path, monkeypatch):
    with jax.numpy_dtype_promotion("standard"):
        flags = ["--config=configs/quickstart.py:sympow", "--config.model.num_layers=1", "--topology=cpu:2"]
        flags += ["--config.evaluation.lengths=64", "--evaluate", f"--output={tmp_path}/plan"]
        assert command.run(flags) == 0
        (plan,) = read_json(tmp_path / "plan.json", kind=list)
        assert plan["status"] == plan["evaluations"][0]["status"] == "fits" and plan["compiled_for"] == "cpu:2"
        monkeypatch.setattr(targets.Target, "capacity", 1000.0)
        assert command.run(flags) == 2
        (plan,) = read_json(tmp_path / "plan.json", kind=list)
        assert plan["evaluations"][0]["reason"].startswith("lower --config.evaluation.chunk_size")
