import importlib.metadata
import importlib.util

import numpy as np
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.planning import targets
from sympow_jax.planning.collectives import bandwidth
from sympow_jax.planning.targets import DEVICES, Target


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:4x4", "choose one of v4, v5e, v5p, v6e, 7x, a100, h100, h200, b200, cpu"),
        ("v5:4x4", "did you mean 'v5p'|did you mean 'v5e'"),
        ("h100", "expected KIND:SIZE, for example v5e:4x4, h100:8 or cpu:1"),
        ("v5e:0x4", "expected KIND:SIZE"),
        ("v5e:3x3", "v5e slices are 1x1, 2x2, 2x4"),
        ("v5p:2x2x3", "or any multiple of 4x4x4"),
        ("v5e:32x32", "v5e slices are"),
        ("h100:16", "h100 takes N or HOSTSxN with 1 to 8 devices a host"),
        ("cpu:64", "XLA_FLAGS=--xla_force_host_platform_device_count=64"),
    ],
)
def test_wrong_names_say_what_is_legal(name, says):
    with pytest.raises(ConfigError, match=says):
        targets.find(name)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("v5e:4x4", "libtpu", "plan"), ("h100:8", "jax_cuda12_plugin", "plan-gpu")]
)
def test_a_missing_compiler_names_the_extra(name, module, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == module else object())
    with pytest.raises(ConfigError, match=rf"needs {module}.*pip install 'sympow_jax\[{extra}\]'"):
        targets.find(name)


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.0.42.1", True), ("0.0.42", True), ("0.0.421", False), ("0.0.52", False)]
)
def test_a_tpu_compiler_of_another_release_is_named(installed, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: installed)
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==0.0.42.*; extra == "tpu"'])
    says = targets.mismatch("tpu")
    assert says.startswith(f"libtpu {installed} is not the 0.0.42.* that jax") == (not fits)
    assert fits or "pip install 'jax[tpu]==" in says
    assert targets.mismatch("gpu") == ""


def test_a_compiler_without_a_distribution_has_no_version(monkeypatch):
    monkeypatch.setitem(targets.COMPILERS, "tpu", "no-such-libtpu")
    assert targets.compiler("tpu") == "no-such-libtpu unknown"
    assert targets.mismatch("tpu") == ""


def test_every_kind_is_listed_and_every_gpu_is_described():
    listed = [line.partition(":")[0] for line in targets.legal()]
    assert listed == [*DEVICES, "cpu"]
    folder = importlib.resources.files("sympow_jax.planning") / "topologies"
    for name, device in DEVICES.items():
        if device.platform == "gpu":
            text = (folder / f"{name}.txtpb").read_text()
            assert f"device_memory_size: {device.hbm_bytes}" in text
            assert "data sheet" in text, f"{name}: where the figures come from"


def test_a_program_may_use_all_of_a_tpus_memory_and_most_of_a_gpus():
    capacities = {name: Target(name, DEVICES[name], (1,), ()).capacity for name in ("v5e", "h100")}
    assert capacities == {"v5e": 15.75 * 2**30, "h100": 0.92 * 84_942_979_072}


class Chip:
    def __init__(self, coords, host):
        self.coords, self.process_index = coords, host


def test_bandwidth_of_a_torus_and_of_hosts():
    pod = [Chip([x, y, 0], 0) for x in range(16) for y in range(4)]
    v5e = Target("v5e:16x4", DEVICES["v5e"], (16, 4), tuple(pod))
    ids = np.arange(64).reshape(16, 4)
    assert bandwidth(tuple(ids[0].tolist()), v5e, pod) == 50e9  # a line of 4
    assert bandwidth(tuple(ids[:, 0].tolist()), v5e, pod) == 2 * 50e9  # a ring of 16
    assert bandwidth(tuple(ids.ravel().tolist()), v5e, pod) == 3 * 50e9
    assert bandwidth(tuple(ids[:8, 0].tolist()), v5e, pod) == 50e9  # half a ring: the way back is not its own
    gpus = [Chip(None, i // 8) for i in range(16)]
    h100 = Target("h100:2x8", DEVICES["h100"], (2, 8), tuple(gpus))
    assert bandwidth(tuple(range(8)), h100, gpus) == 450e9
    assert bandwidth((0, 8), h100, gpus) == 50e9
