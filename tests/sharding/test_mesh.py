"""Mesh sizes, the table of parameter axes, and what is refused before anything is compiled."""

import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model
from sympow_jax.ops import platform
from sympow_jax.sharding import processes
from sympow_jax.sharding.processes import launcher
from sympow_jax.sharding.table import spec
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.data import RunData
from sympow_jax.training.train_state import abstract_train_state
from tests.models.small import VOCAB, tiny_config

SIZES = {"data": -1, "fsdp": 1, "tensor": 1, "seq": 1}


def test_the_inferred_axis_takes_what_the_others_leave():
    assert sharding.infer_sizes(SIZES | {"fsdp": 2, "seq": 2}, 8) == {"data": 2, "fsdp": 2, "tensor": 1, "seq": 2}
    with pytest.raises(ValueError, match=r"mesh.seq = -1: mesh.data is -1 too"):
        sharding.infer_sizes(SIZES | {"seq": -1}, 8)
    with pytest.raises(ValueError, match=r"= 3 does not divide the 8 devices.*a product of 2 would"):
        sharding.infer_sizes(SIZES | {"fsdp": 3}, 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU chip: there is none here."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def chips(*shape: int, slices: int = 1) -> list[Chip]:
    places = list(itertools.product(range(slices), *(range(size) for size in shape)))
    return [Chip(i, place[1:], place[0]) for i, place in enumerate(places)]


def test_an_axis_may_take_a_part_of_an_axis_of_the_torus():
    mesh = sharding.make_mesh(SIZES | {"seq": 8}, chips(4, 4, 4))
    assert mesh.devices.shape == (8, 1, 1, 8)
    assert len({chip.id for chip in mesh.devices.flat}) == 64


@pytest.mark.parametrize("rows", [{"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2}])
def test_slices_lie_along_the_batch(rows):
    sizes = SIZES | {"data": 1, "seq": 4} | rows
    devices = sharding.make_mesh(sizes, chips(2, 2, 1, slices=4)).devices.reshape(4, 4)
    assert [{chip.slice_index for chip in row} for row in devices] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["mesh.data=1", "mesh.seq=16"], chips(2, 2, 2, slices=2), r"data 1 x fsdp 1: .* 2 slices.*a multiple of 2"),
        (["mesh.data=3", "data.batch_size=3"], chips(2, 2, 1), r"mesh: the first 3 chips of the slice are not a box"),
    ],
)
def test_chips_that_a_mesh_cannot_be_laid_over_are_one_line(flags, devices, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_mesh(tiny_config("conformal_sympow", "data.seq_len=32", *flags), devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.batch_size=4"], r"data.batch_size = 4: .*data 8 x fsdp 1.*use 8, or a mesh with data x fsdp = 4"),
        (["mesh.tensor=4"], r"model.num_kv_heads = 2: .*tensor = 4; use 4, or mesh tensor = 2"),
        (["mesh.tensor=2", "model.mlp_dim=33"], r"model.mlp_dim = 33: .*use 34, or mesh tensor = 1"),
        (["mesh.fsdp=8", "model.embed_dim=36"], r"model.embed_dim = 36: .*fsdp x tensor = 8; use 40"),
        (["mesh.seq=8", "data.seq_len=30"], r"data.seq_len = 30: must be a multiple of 8 .*use 32"),
        (["mesh.data=16"], r"= 16 devices, and there are 8"),
        (["mesh.seq=8", "data.seq_len=24", "attention.position=fire"], r"data.seq_len = 24: must be a multiple of 16 "),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line_with_the_value_that_would(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_mesh(tiny_config("conformal_sympow", *["data.batch_size=8", *flags]))
    assert "\n" not in str(error.value)


def test_softmax_needs_two_halves_of_each_shard():
    with pytest.raises(ConfigError, match=r"data.seq_len = 24: must be a multiple of 16"):
        config_mesh(tiny_config("softmax_rope", "mesh.seq=8"))


@pytest.mark.parametrize(
    "variant", ["conformal_sympow", "selective_rope", "softmax_fire_shared", "softmax_absolute", "based"]
)
def test_the_table_places_every_array_of_a_train_state(variant):
    config = tiny_config(variant, "data.batch_size=8", "mesh.fsdp=2", "mesh.tensor=2")
    state = abstract_train_state(Model(config, VOCAB, config_mesh(config)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    matrices = [leaf for path, leaf in leaves if "kernel'" in str(path[-1]) and leaf.ndim == 3]
    assert matrices and all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in matrices)
    params, moments = state.params, state.opt_state[1][0].mu
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, moments)


def test_the_table_places_the_state_of_muon():
    config = tiny_config("conformal_sympow", "data.batch_size=8", "mesh.fsdp=2", "mesh.tensor=2", "optimizer.name=muon")
    model = Model(config, VOCAB, config_mesh(config))
    matrices = [x for x in jax.tree.leaves(abstract_train_state(model).opt_state) if x.ndim == 3]
    assert matrices and all(x.sharding.shard_shape(x.shape) != x.shape for x in matrices)


def test_an_unknown_parameter_needs_a_row():
    with pytest.raises(ValueError, match=r"blocks_0/mixer/novelty: no row of the table"):
        sharding.tree_specs({"blocks_0": {"mixer": {"novelty": np.zeros((2, 3))}}})
    assert sharding.tree_specs({"blocks_0": {"mixer": {"query": {"kernel": np.zeros((2, 4, 4))}}}}) == {
        "blocks_0": {"mixer": {"query": {"kernel": P(None, "fsdp", "tensor")}}}
    }


BOTH = ("fsdp", "tensor")


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("embedding/embedding", "V E", (None, BOTH)),
        ("output", "E V", (BOTH, None)),
        ("blocks_0/mixer/query/kernel", "L E HD", (None, "fsdp", "tensor")),
        ("blocks_0/mixer/out/kernel", "L HD E", (None, "tensor", "fsdp")),
        ("blocks_0/mixer/beta_down/kernel", "L E R", (None, "fsdp", None)),
        ("blocks_0/mixer/beta_up/kernel", "L R KF", (None, None, "tensor")),
        ("blocks_0/mlp/up/kernel", "L E F", (None, "fsdp", "tensor")),
        ("blocks_0/mlp/up/bias", "L F", (None, "tensor")),
        ("blocks_0/mlp/down/kernel", "L F E", (None, "tensor", "fsdp")),
        ("blocks_0/mlp/down/bias", "L E", (None,)),
        ("blocks_0/mixer/query/bias", "L HD", (None, "tensor")),
        ("blocks_0/mixer/out/bias", "L E", (None,)),
        ("blocks_0/mixer/query_norm/scale", "L HD", (None,)),
        ("blocks_0/mixer/kernel", "L W F", (None, None, "tensor")),
        ("blocks_0/mixer/bias_parameters/table", "L B H", (None, None, "tensor")),
        ("blocks_0/mixer/bias_parameters/slopes", "L H", (None, "tensor")),
        ("final_norm/scale", "E", ()),
        ("count", "", ()),
    ],
)
def test_products_are_cut_along_the_dim_that_the_next_one_sums(name, shape, axes):
    """Columns of what goes into a layer's heads and features, rows of what comes out of them."""
    assert spec(name, len(shape.split())) == P(*axes)


def test_a_batch_lies_in_rows_and_stretches_of_time():
    config = tiny_config("sympow", "data.batch_size=8", "mesh.fsdp=2", "mesh.seq=2")
    mesh = config_mesh(config)
    assert sharding.row_blocks(mesh) == ([0, 1, 2, 3], 4)
    tokens = np.arange(8 * 24, dtype=np.int32).reshape(8, 24)
    placed = RunData(config, mesh, None, None).place({"inputs": tokens})["inputs"]  # pyright: ignore
    np.testing.assert_array_equal(placed, tokens)
    assert placed.sharding.shard_shape(placed.shape) == (2, 12)


def test_a_launcher_is_recognised_by_what_it_sets(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert launcher() == ""
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert launcher() == "GKE"
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node"}.items():
        monkeypatch.setenv(name, value)
    assert launcher() == "SLURM"
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launcher() == "Open MPI"
    with pytest.raises(ValueError, match=r"--num_processes = 2.*give all three"):
        sharding.join_processes(num_processes=2)


def test_a_mesh_of_one_device_is_as_good_as_none():
    with sharding.use_mesh(sharding.make_mesh(SIZES | {"data": 1})):
        assert not sharding.is_sharded() and platform.unsplit()
    with sharding.use_mesh(sharding.make_mesh(SIZES)):
        assert sharding.is_sharded() and not platform.unsplit()


def test_a_launcher_without_peers_is_waited_for_aloud_and_not_forever(monkeypatch, capsys):
    """The line names the variables and how to train alone; without an answer the process ends with 1."""
    ended = threading.Event()
    monkeypatch.setattr(processes, "_QUIET", 0.01)
    monkeypatch.setattr(processes, "_LIMIT", 0.05)
    monkeypatch.setattr(processes.os, "_exit", lambda code: codes.append(code) or ended.set())
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: ended.wait(10))
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)
    codes: list[int] = []
    processes.join_processes()
    assert codes == [1]
    said, error = capsys.readouterr().err.splitlines()
    told = "SLURM (SLURM_STEP_NODELIST = n[1-2], SLURM_NTASKS = 2, SLURM_PROCID = 0)"
    alone = "to run in this process alone, unset SLURM_STEP_NODELIST"
    assert said.startswith("waiting up to") and error.startswith("error: waited")
    assert told in said and told in error and alone in said and alone in error


def test_what_a_launcher_says_wrongly_is_one_line(monkeypatch):
    def fail(**_):
        raise RuntimeError("no such\nhost")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"Open MPI \(OMPI_COMM_WORLD_SIZE = 2\): no such host; to .* alone, unset"):
        processes.join_processes()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2(x3)")
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE = '2\(x3\)': must be a number of processes"):
        processes.join_processes()


def test_what_does_not_divide_is_whole():
    """Rows of one prompt, one token."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 1, "seq": 2})
    with sharding.use_mesh(mesh):
        found = [sharding.dividing(size, sharding.BATCH) for size in (1, 2, 4, 6, 8)]
        assert found == [None, None, sharding.BATCH, None, sharding.BATCH]
        assert sharding.dividing(1, "seq") is None and sharding.dividing(6, "seq") == "seq"
        assert sharding.dividing(3, None) is None
    assert sharding.dividing(3, sharding.BATCH) == sharding.BATCH  # without a mesh nothing is cut
