"""The first screen's parts, and the meter's arithmetic."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model
from sympow_jax.training import meter, metrics, screen
from tests.models.small import VOCAB, tiny_config


def test_modules_add_up_to_the_parameters():
    params = jax.eval_shape(Model(tiny_config("conformal_sympow"), VOCAB).init, jax.random.key(0))
    columns = [list(column.cells) for column in screen.module_table(params).columns]
    rows = {name: (layers, int(count.replace(",", ""))) for name, layers, count, _ in zip(*columns, strict=True)}
    assert rows["blocks_0/mixer/query"] == ("2 x", 2 * 32 * 32)
    assert rows["blocks_0/mlp"] == ("2 x", 2 * (2 * 32 * 48 + 48 + 32))
    assert rows["embedding"] == ("", VOCAB * 32)
    *parts, total = rows.values()
    assert sum(count for _, count in parts) == total[1] == screen.num_parameters(params)


def test_changes_name_the_key_the_value_and_the_default():
    changes = screen.config_changes(tiny_config("sympow"))
    assert "model.num_heads = 2 (12)" in changes and "data.seq_len = 24 (512)" in changes
    assert not any(change.startswith(("variant", "optimizer.")) for change in changes)


def test_mesh_names_the_axes_that_split():
    devices = np.array(jax.devices()[:8]).reshape(1, 4, 1, 2)
    assert screen.mesh_line(Mesh(devices, ("data", "fsdp", "tensor", "seq"))) == "fsdp 4 x seq 2: 8 x cpu"
    assert screen.mesh_line(Mesh(devices[:, :1, :, :1], ("data", "fsdp", "tensor", "seq"))) == "one device: 1 x cpu"


class Waiting:
    def __init__(self):
        self.fraction = 0.25

    def wait_fraction(self) -> float:
        return self.fraction


def test_meter_splits_the_time_and_leaves_out_evaluation(monkeypatch):
    """10 steps of 100 tokens in 20 s on 2 devices, 4 s of them saving; then an evaluation that does not count."""
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    m = meter.Meter(Waiting(), tokens_per_step=100, flops_per_token=6.0, peak_flops=300.0, num_devices=2, first_step=5)
    clock[0] = 10.0
    with m.saving():
        clock[0] = 14.0
    clock[0] = 20.0
    assert m.row(15) == {
        "tokens_per_sec": 50.0, "tokens_per_sec_per_device": 25.0, "mfu": 0.5, "data_wait_fraction": 0.25,
        "checkpoint_fraction": 0.2, "compute_fraction": 0.55,
    }  # fmt: skip
    clock[0] = 500.0
    m.restart(15)
    clock[0] = 504.0
    row = m.row(17)
    assert row["tokens_per_sec"] == 50.0 and row["checkpoint_fraction"] == 0.0


def test_a_missing_wandb_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    metrics.check_wandb("")
    with pytest.raises(ConfigError, match=r"logging.wandb_project = 'p': .* 'sympow_jax\[wandb\]'"):
        metrics.check_wandb("p")
