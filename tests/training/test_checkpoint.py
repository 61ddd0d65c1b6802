"""Checkpoints: round trips over meshes, retention, damage of every kind; failed saves are in test_failed_saves.py."""

import gc
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.digests import digest_arrays
from sympow_jax.training.manifest import CheckpointError, CheckpointMismatchError, flatten, unflatten
from sympow_jax.training.step_folders import list_steps

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, after an error


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=axis_types, devices=jax.devices()[: shape[0] * shape[1]])


def make_tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "params": {"block.0": {"kernel": normal(64, 32)}, "scale": normal(8).astype(jnp.bfloat16)},
        "opt_state": {"0": {"count": jnp.int32(seed), "mu": normal(64, 32)}, "1": {}},
        "key": jax.random.key_data(jax.random.key(seed)),
        "mask": np.array([True, False]),
    }


def like(tree, mesh=None):
    def spec(x):
        sharded = P("fsdp", "tensor") if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharded) if mesh else None)

    return jax.tree.map(spec, tree)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), path


def save_steps(directory, steps, metrics=None, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            loss = None if metrics is None else {"heldout_loss": metrics[step]}
            assert checkpointer.save(step, make_tree(step), metadata={"step": step}, metrics=loss)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    """A directory with sound steps 1 and 2, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("sound") / "checkpoints"
    save_steps(directory, (1, 2))
    return directory


@pytest.fixture
def damaged(sound, tmp_path) -> Iterator[pathlib.Path]:
    yield pathlib.Path(shutil.copytree(sound, tmp_path / "checkpoints"))
    gc.collect()  # what Orbax drops half-done after an error is reported in the test it belongs to


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    tree, metadata = make_tree(), {"note": "é", "list": [1, 2.5, None]}
    with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        assert checkpointer.save(7, tree, metadata=metadata)
        assert not checkpointer.save(7, tree, metadata=metadata)
        restored = checkpointer.restore(like=like(tree))
        assert checkpointer.restore_seconds > 0 and checkpointer.save_stall_seconds > 0
    assert restored.step == 7 and restored.metadata == metadata
    assert_equal(restored.tree, tree)
    specs, described = checkpointer.describe(7)
    assert described == metadata
    assert specs["params/scale"] == jax.ShapeDtypeStruct((8,), jnp.bfloat16)


def test_orbax_alone_can_read_the_arrays(sound):
    target = unflatten(flatten(jax.tree.map(jnp.asarray, make_tree(2))))  # empty dicts are not stored
    with ocp.StandardCheckpointer() as plain:
        got = plain.restore(sound / "2" / "state", like(target))
    assert_equal(got, target)


@pytest.mark.parametrize(("saved_on", "read_on"), [((4, 2), (1, 1)), ((1, 1), (4, 2)), ((8, 1), (2, 4))])
def test_any_mesh_reads_what_any_mesh_saved(tmp_path, saved_on, read_on):
    tree = jax.tree.map(jnp.asarray, make_tree())
    shardings = jax.tree.map(lambda s: s.sharding, like(tree, make_mesh(*saved_on)))
    target = like(tree, make_mesh(*read_on))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jax.device_put(tree, shardings), metadata={})
        restored = checkpointer.restore(like=target).tree
    assert_equal(restored, tree)
    for array, spec in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert array.sharding == spec.sharding


def test_part_of_the_tree_can_be_read(sound):
    with Checkpointer(sound, read_only=True) as checkpointer:
        restored = checkpointer.restore(like=like({"params": make_tree()["params"]}))
    assert_equal(restored.tree, {"params": make_tree(2)["params"]})


def test_an_asynchronous_save_keeps_the_values_of_its_step(tmp_path):
    update = jax.jit(lambda x: x * -3.0, donate_argnums=0)
    tree = {"x": jnp.arange(1 << 20, dtype=jnp.float32)}
    want = np.array(tree["x"])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, metadata={})
        for _ in range(5):
            tree = {"x": update(tree["x"])}
        tree["x"].block_until_ready()
        restored = checkpointer.restore(like=like(tree))
    assert np.array_equal(np.asarray(restored.tree["x"]), want)


# -- digests


def test_digest_does_not_depend_on_the_sharding(rng):
    x = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    digests = {
        digest_arrays({"x": jax.device_put(x, NamedSharding(make_mesh(*mesh), spec))})["x"]
        for mesh, spec in [((1, 1), P()), ((4, 2), P("fsdp", "tensor")), ((2, 4), P(None, "tensor")), ((8, 1), P())]
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_digest_sees_every_bit(dtype):
    x = np.asarray(jnp.zeros((4, 3), dtype))
    variants = [x.tobytes()]
    for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
        raw = bytearray(variants[0])
        raw[5 * x.dtype.itemsize + bit // 8] ^= 1 << (bit % 8)
        variants.append(bytes(raw))
    arrays = {str(i): np.frombuffer(raw, x.dtype).reshape(x.shape) for i, raw in enumerate(variants)}
    assert len(set(digest_arrays(arrays).values())) == len(variants)


def test_digest_sees_exchanged_elements_and_shapes_are_in_row_major_order():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    digests = digest_arrays({"x": x, "swapped": x[:, jnp.array([1, 0, 2])], "transposed": x.T, "flat": x.reshape(-1)})
    assert digests["x"] == digests["flat"]
    assert len({digests["x"], digests["swapped"], digests["transposed"]}) == 3


def mix(word: int) -> int:
    """MurmurHash3's finaliser (Appleby 2011)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        word = (word ^ word >> shift) * factor % 2**32
    return word


def test_digest_is_its_formula_in_plain_integers(rng):
    words = rng.integers(0, 2**32, 6, dtype=np.uint32)
    keys = [mix((i + 0x9E3779B9) % 2**32) for i in range(6)]
    pairs = list(zip(words.tolist(), keys, strict=True))
    first = sum(mix(word ^ key) for word, key in pairs) % 2**32
    second = sum(mix((word + key * 0x27D4EB2F) % 2**32) for word, key in pairs) % 2**32
    assert digest_arrays({"x": words.reshape(2, 3)})["x"] == f"{first:08x}{second:08x}"


# -- which steps are kept


def test_keeps_last_every_and_best(tmp_path):
    losses = {step: abs(step - 3.0) for step in range(1, 11)}
    save_steps(tmp_path, range(1, 11), losses, keep_last=2, keep_every=5)
    reader = Checkpointer(tmp_path, read_only=True)
    assert reader.steps() == [3, 5, 9, 10] and reader.best_step() == 3
    assert reader.restore("best", like=like(make_tree())).step == 3


def test_without_best_only_the_last_are_kept(tmp_path):
    save_steps(tmp_path, range(5), dict.fromkeys(range(5), 1.0), keep_last=2, keep_best=False)
    assert Checkpointer(tmp_path, read_only=True).steps() == [3, 4]


def test_best_ignores_steps_without_a_finite_loss(tmp_path):
    save_steps(tmp_path, (1, 2, 3), {1: float("nan"), 2: 5.0, 3: float("inf")})
    assert Checkpointer(tmp_path, read_only=True).best_step() == 2
    assert json.loads((tmp_path / "2" / "manifest" / "metadata").read_text())["metrics"] == {"heldout_loss": 5.0}


def test_what_is_measured_of_a_step_on_disk_counts_like_what_was_saved_with_it(tmp_path):
    save_steps(tmp_path, (1, 2), {1: 2.0, 2: float("inf")})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.add(2, metadata={"evaluated_step": 2}, metrics={"heldout_loss": 1.0})
        assert checkpointer.best_step() == 2
    restored = Checkpointer(tmp_path, read_only=True).restore("best", like=like(make_tree()))
    assert restored.step == 2 and restored.metadata == {"step": 2, "evaluated_step": 2}
    assert_equal(restored.tree, make_tree(2))


def test_the_newest_of_equally_good_steps_is_the_best(tmp_path):
    save_steps(tmp_path, (1, 2, 3, 4), {1: 2.0, 2: 1.0, 3: 1.0, 4: 2.0}, keep_last=4)
    reader = Checkpointer(tmp_path, read_only=True)
    assert reader.best_step() == 3 and reader._folders.candidates("best") == [3, 2, 4, 1]


# -- damage


def damage_and_restore(directory: pathlib.Path, caplog) -> int:
    caplog.clear()
    with caplog.at_level(logging.ERROR), Checkpointer(directory, read_only=True) as checkpointer:
        restored = checkpointer.restore(like=like(make_tree()))
    assert_equal(restored.tree, make_tree(restored.step))
    assert restored.metadata == {"step": restored.step}
    if restored.step == 1:
        assert "checkpoint step 2" in caplog.text and "is damaged" in caplog.text
    return restored.step


def files_of(step: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def test_a_flipped_byte_anywhere_is_seen_or_harmless(damaged, caplog, rng):
    step, by_digest = damaged / "2", 0
    names = files_of(step)
    for name in names:
        path = step / name
        original = path.read_bytes()
        for place in rng.integers(len(original), size=3):
            raw = bytearray(original)
            raw[place] ^= int(rng.integers(1, 256))
            path.write_bytes(raw)
            damage_and_restore(damaged, caplog)
            by_digest += "differ from what was saved, first " in caplog.text
        path.write_bytes(original)
    assert len(names) > 8 and by_digest >= 1  # some damage is seen by nothing else


BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [2**15, 2**15]}, r"params/block.0/kernel: is in chunks of \[32768, 32768\] where"),
        ({"chunks": [64]}, r"chunks of \[64\] where its shape is \[64, 32\]"),
        ({"compressor": BLOSC}, "is compressed with {'id': 'blosc'"),
        ("state/_METADATA", "_METADATA: has 1,099,511,627,776 bytes; at most 67,108,864 are read"),
        ("_CHECKPOINT_METADATA", "_CHECKPOINT_METADATA: has 1,099"),
        ("a pipe", "_sharding: is no regular file"),
    ],
)
def test_what_would_take_more_memory_than_the_arrays_is_not_read(damaged, caplog, change, message):
    state = damaged / "2" / "state"
    if change == "a pipe":
        (state / "_sharding").unlink()
        os.mkfifo(state / "_sharding")
    elif isinstance(change, str):
        os.truncate(damaged / "2" / change, 2**40)
    else:
        kvstore = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
        zarray = json.loads(kvstore.read("params.block.0.kernel/.zarray").result().value)
        kvstore.write("params.block.0.kernel/.zarray", json.dumps(zarray | change)).result()
    assert damage_and_restore(damaged, caplog) == 1
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    "how", ["deleted", "zeroed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "garbled"))]
)
def test_a_damaged_file_is_seen_or_harmless(damaged, caplog, how):
    step, fallbacks = damaged / "2", 0
    for name in files_of(step):
        path = step / name
        original = path.read_bytes()
        if how == "deleted":
            path.unlink()
        else:
            half = len(original) // 2
            path.write_bytes(
                {
                    "truncated": original[:half],
                    "garbled": b"{",
                    "zeroed": original[:half] + bytes(len(original) - half),
                }[how]
            )
        fallbacks += damage_and_restore(damaged, caplog) == 1
        path.write_bytes(original)
    assert fallbacks >= 3


def damage_manifest(step: pathlib.Path) -> None:
    path = step / "manifest" / "metadata"
    path.write_text(path.read_text().replace('"step"', '"stop"', 1))


def test_a_damaged_step_is_set_aside_and_training_can_save_it_again(damaged, caplog):
    damage_manifest(damaged / "2")
    with Checkpointer(damaged) as checkpointer:
        assert checkpointer.restore(like=like(make_tree())).step == 1
        assert checkpointer.steps() == [1] and (damaged / "2.damaged").is_dir()
        assert checkpointer.save(2, make_tree(2), metadata={})
        assert checkpointer.restore(like=like(make_tree())).step == 2


def test_strict_and_numbered_restores_do_not_fall_back(damaged):
    damage_manifest(damaged / "2")
    with Checkpointer(damaged) as checkpointer:
        for options in ({"strict": True}, {"step": 2}):
            with pytest.raises(CheckpointError, match=r"tried 1 of \[1, 2\]:\n  step 2: .*manifest"):
                checkpointer.restore(like=like(make_tree()), **options)
        assert checkpointer.steps() == [1, 2]


def test_all_damaged_is_an_error_that_lists_them_and_touches_nothing(damaged):
    for step in ("1", "2"):
        damage_manifest(damaged / step)
    with Checkpointer(damaged) as checkpointer:
        with pytest.raises(CheckpointError, match=r"no sound checkpoint .*\n  step 2: .*\n  step 1: "):
            checkpointer.restore(like=like(make_tree()))
        assert checkpointer.steps() == [1, 2]


def test_best_falls_back_to_the_next_best(tmp_path):
    save_steps(tmp_path, (1, 2, 3), {1: 3.0, 2: 1.0, 3: 2.0})
    data = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(bytes(data.stat().st_size))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.restore("best", like=like(make_tree())).step == 3


# -- what does not fit


def replace(tree, name, value):
    flat = flatten(tree) | {name: value}
    return unflatten({key: leaf for key, leaf in flat.items() if leaf is not None})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "params/scale",
            jax.ShapeDtypeStruct((8,), jnp.float32),
            r"scale was saved as bfloat16\[8\] and is wanted as float32\[8\]",
        ),
        (
            "params/block.0/kernel",
            jax.ShapeDtypeStruct((64, 33), jnp.float32),
            r"kernel was saved as float32\[64, 32\]",
        ),
        ("params/extra", jax.ShapeDtypeStruct((1,), jnp.float32), "has no array params/extra"),
        ("params/scale", None, "1 arrays that this model lacks, first params/scale"),
    ],
)
def test_another_shape_dtype_or_name_is_an_error_not_a_fallback(sound, name, value, message):
    with Checkpointer(sound, read_only=True) as checkpointer, pytest.raises(CheckpointMismatchError, match=message):
        checkpointer.restore(like=replace(like(make_tree()), name, value))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": [1, 2]}}, "a/b is list"),
        ({"a": jax.random.key(0)}, "a is .*key_data"),
        ({"a": jnp.zeros((0, 3))}, r"a has shape \(0, 3\)"),
        ({"a/b": jnp.zeros(3)}, "not a plain name"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path, tree, message):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match=message):
        checkpointer.save(1, tree, metadata={})


def test_only_numbers_as_they_are_written_are_steps(tmp_path):
    for name in ("10", "2", "007", "²", "٣", "3.damaged"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [2, 10]


def test_missing_steps_are_named(sound, tmp_path):
    with pytest.raises(CheckpointError, match=r"step=9 is not in .*\[1, 2\]"):
        Checkpointer(sound, read_only=True).restore(9, like={})
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpointer(tmp_path / "absent", read_only=True).restore(like={})
    assert not (tmp_path / "absent").exists()
