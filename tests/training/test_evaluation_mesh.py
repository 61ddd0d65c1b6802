"""Where a trained model is measured: the mesh asked for, the run's, or what is there."""

import dataclasses
import types

import pytest

from sympow_jax import sharding
from sympow_jax.config import ConfigError
from sympow_jax.training.evaluation_mesh import evaluation_sizes, mesh_note
from tests.models.small import tiny_config


def devices(count: int, processes: int = 1):
    kind = {"platform": "cpu", "device_kind": "cpu"}
    return [types.SimpleNamespace(id=i, process_index=i * processes // count, **kind) for i in range(count)]


def sizes_of(config, asked, devices, **options):
    return tuple(evaluation_sizes(config, asked, devices, **options).values())


@pytest.mark.parametrize(
    ("run", "there", "asked", "rows", "want"),
    [
        ((), 8, {}, 0, (8, 1, 1, 1)),
        (("mesh.fsdp=4", "mesh.tensor=2"), 8, {}, 0, (1, 4, 2, 1)),
        (("mesh.data=8",), 4, {}, 0, (4, 1, 1, 1)),  # less of the same
        (("mesh.data=1", "mesh.fsdp=8"), 1, {}, 0, (1, 1, 1, 1)),  # what is there
        (("mesh.data=1", "mesh.fsdp=8"), 6, {}, 0, (6, 1, 1, 1)),
        (("mesh.fsdp=8",), 8, {"seq": 4}, 0, (2, 1, 1, 4)),  # a whole mesh, not an axis of the run's
        ((), 8, {}, 1, (1, 1, 1, 1)),  # one prompt
        ((), 8, {}, 12, (4, 1, 1, 1)),
        (("mesh.data=2", "mesh.fsdp=4"), 8, {}, 8, (2, 4, 1, 1)),
        (("mesh.data=2", "mesh.fsdp=4"), 8, {}, 9, (1, 4, 1, 1)),
        ((), 8, {"data": 8}, 1, (8, 1, 1, 1)),  # as asked
    ],
)
def test_the_mesh_is_the_one_asked_for_or_the_runs_or_what_is_there(run, there, asked, rows, want):
    config = tiny_config("conformal_sympow", *run)
    assert sizes_of(config, asked, devices(there), rows=rows) == want


def test_several_processes_leave_no_device_out():
    assert sizes_of(tiny_config("fox"), {}, devices(4, processes=2), rows=1) == (4, 1, 1, 1)
    one = {"mesh": dataclasses.replace(tiny_config("fox").mesh, data=1, fsdp=2)}
    config = dataclasses.replace(tiny_config("fox"), **one)
    assert sizes_of(config, {}, devices(4, processes=2)) == (2, 2, 1, 1)
    with pytest.raises(ConfigError, match="2 of the 4 devices of several processes"):
        sizes_of(config, {"data": 2}, devices(4, processes=2))


@pytest.mark.parametrize(
    ("variant", "asked", "message"),
    [
        ("fox", {"data": 16}, "data 16 x fsdp 1 x tensor 1 x seq 1 = 16 devices, and there are 8"),
        ("fox", {"tensor": 4}, "model.num_kv_heads = 2: must be a multiple of mesh tensor = 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(variant, asked, message):
    with pytest.raises(ConfigError, match=message):
        sizes_of(tiny_config(variant), asked, devices(8))


def test_the_screen_says_where_another_mesh_than_the_runs_had_to_do():
    config = tiny_config("fox", "mesh.data=1", "mesh.fsdp=16")
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1, "seq": 1})
    assert mesh_note(config, mesh, {"data": 8}) == "mesh: data 8: 8 x cpu"
    assert mesh_note(config, mesh, {}) == "mesh: data 8: 8 x cpu; the run's fsdp 16 does not fit what is here"
