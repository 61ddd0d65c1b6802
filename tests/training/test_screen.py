"""The first screen's parts, and the clock's arithmetic."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model
from sympow_jax.training import clock, metrics, screen
from sympow_jax.training.data import open_run_data
from tests.input_pipeline.stores import write_store
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
    assert [change for change in changes if change.startswith(("variant", "optimizer."))] == [
        "optimizer.learning_rate = 0.005 (0.003)"
    ]


def test_mesh_names_the_axes_that_split():
    devices = np.array(jax.devices()[:8]).reshape(1, 4, 1, 2)
    assert screen.mesh_line(Mesh(devices, ("data", "fsdp", "tensor", "seq"))) == "fsdp 4 x seq 2: 8 x cpu"
    assert screen.mesh_line(Mesh(devices[:, :1, :, :1], ("data", "fsdp", "tensor", "seq"))) == "one device: 1 x cpu"


def test_names_on_the_first_screen_are_no_markup(tmp_path, rng, capsys):
    write_store(
        tmp_path / "[b]", rng.integers(0, 61, (6, 48)).astype(np.uint16), chunks=(2, 24), vocab_size=61, bos_id=60
    )
    config = tiny_config("sympow", f"data.train={tmp_path}/[b]", f"data.heldout={tmp_path}/[b]")
    data = open_run_data(config)
    params = jax.eval_shape(Model(config, VOCAB).init, jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "tensor", "seq"))
    screen.print_first_screen(config, params, data, mesh, 0, "runs/[/a]")
    assert "runs/[/a], 800 steps" in capsys.readouterr().out


class Waiting:
    def __init__(self):
        self.fraction = 0.25

    def wait_fraction(self) -> float:
        return self.fraction


def test_clock_splits_the_time_and_leaves_out_evaluation(monkeypatch):
    """10 steps of 100 tokens in 20 s on 2 devices, 4 s of them saving; then an evaluation that does not count."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    c = clock.Clock()
    with c.evaluating(5):  # of a step restored, before any step of this process
        now[0] = 1000.0
    c.begin(5, Waiting(), tokens_per_step=100, flops_per_token=6.0, peak_flops=300.0, num_devices=2)
    now[0] = 1010.0
    c.saved(4.0)
    now[0] = 1020.0
    assert c.row(15) == {
        "tokens_per_sec": 50.0, "tokens_per_sec_per_device": 25.0, "mfu": 0.5, "data_wait_fraction": 0.25,
        "checkpoint_fraction": 0.2, "compute_fraction": 0.55, "save_stall_seconds": 4.0,
    }  # fmt: skip
    with c.evaluating(15):
        now[0] = 1500.0
    now[0] = 1504.0
    row = c.row(17)
    assert row["tokens_per_sec"] == 50.0 and row["checkpoint_fraction"] == 0.0 and "save_stall_seconds" not in row
    line = "12 steps in 1504.0 s: 1.3% for steps and start-up; 1 saves held it for 4.00 s, 4.000 s at most"
    assert c.summary(12).startswith(line)


def test_a_missing_wandb_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    metrics.check_wandb("")
    with pytest.raises(ConfigError, match=r"logging.wandb_project = 'p': .* 'sympow_jax\[wandb\]'"):
        metrics.check_wandb("p")
