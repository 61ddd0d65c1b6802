"""CPU devices: one a core as far as mesh and batch divide, chosen before JAX starts; a run says how many it had."""

import json
import os
import subprocess
import sys

import jax
import pytest

from sympow_jax import train
from sympow_jax.config import ConfigError
from sympow_jax.training.cpu_devices import num_cpu_devices, use_cpu_devices, use_cpu_devices_of_run
from tests.models.small import ROOT, TINY, tiny_config


@pytest.mark.parametrize(
    ("cores", "flags", "devices"),
    [
        (4, "data.batch_size=8", 4),
        (4, "data.batch_size=6", 3),
        (4, "data.batch_size=1", 1),
        (8, "data.batch_size=8 optimizer.accumulation_steps=2", 4),
        (4, "data.batch_size=1 mesh.tensor=2", 2),
        (4, "data.batch_size=8 mesh.data=1", 1),
        (4, "data.batch_size=8 mesh.data=1 mesh.fsdp=2", 2),
        (2, "data.batch_size=8 mesh.data=1 mesh.fsdp=4", 1),
        (4, "data.batch_size=8 mesh.data=2 mesh.seq=-1", 4),
        (2, "data.batch_size=8 mesh.cpu_devices=5", 5),
    ],
)
def test_one_device_a_core_as_far_as_mesh_and_batch_divide(cores, flags, devices):
    assert num_cpu_devices(tiny_config("softmax_nope", *flags.split()), cores) == devices


def test_the_environment_says_how_many_where_it_names_a_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.append((name, value)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    two, auto = (tiny_config("softmax_nope", f"mesh.cpu_devices={n}") for n in (2, -1))
    for name, value in (("XLA_FLAGS", "--xla_force_host_platform_device_count=8"), ("JAX_NUM_CPU_DEVICES", "8")):
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        monkeypatch.setenv(name, value)
        use_cpu_devices(auto)
        with pytest.raises(ConfigError, match=f"^mesh.cpu_devices = 2: {name} names a number too; use -1, or unset"):
            use_cpu_devices(two)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    assert chosen == []
    use_cpu_devices(auto)
    use_cpu_devices(two)
    assert chosen == [("jax_num_cpu_devices", 4), ("jax_num_cpu_devices", 2)]


def test_an_evaluation_has_the_devices_of_its_run_at_most_one_a_core(monkeypatch):
    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda _, value: chosen.append(value))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    runs = [tiny_config("softmax_nope", f"mesh.cpu_devices={n}") for n in (2, 8, 1)]
    use_cpu_devices_of_run(runs[0])  # the tests' own environment names a number
    monkeypatch.delenv("XLA_FLAGS")
    for run in runs:
        use_cpu_devices_of_run(run)
    assert chosen == [2, 4, 1]


def test_train_chooses_before_the_run(monkeypatch):
    done = []
    monkeypatch.setattr("sympow_jax.training.cpu_devices.use_cpu_devices", lambda _: done.append("choose"))
    monkeypatch.setattr("sympow_jax.training.loop.train", lambda *_, **__: done.append("train") or 0)
    monkeypatch.setattr(train, "use_compilation_cache", lambda: None)
    assert train.run([f"--config={ROOT}/configs/quickstart.py", "--workdir=W"]) == 0 and done == ["choose", "train"]


@pytest.mark.slow
def test_a_run_keeps_the_number_and_a_resume_on_another_says_what_may_differ(tmp_path):
    def trained(devices, steps):
        flags = (*TINY, "data.batch_size=4", "evaluation.every_steps=0", "evaluation.num_batches=1",
                 f"num_train_steps={steps}", f"mesh.cpu_devices={devices}")  # fmt: skip
        command = [
            sys.executable,
            "train.py",
            "--config=configs/quickstart.py:softmax_nope",
            f"--workdir={tmp_path}/run",
        ]
        command += [f"--config.{flag}" for flag in flags]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "run" / "config.json").read_text())["mesh"]["cpu_devices"]

    out, number = trained(2, 2)
    assert number == 2 and "data 2: 2 x cpu" in out and "mesh.cpu_devices = 2 (-1)" in out
    out, number = trained(1, 3)
    assert number == 1 and "one device: 1 x cpu" in out
    assert "config change: mesh.cpu_devices: 2 -> 1; sums are split otherwise, and losses may differ" in out
