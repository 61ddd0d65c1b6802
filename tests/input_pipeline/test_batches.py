import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sympow_jax.input_pipeline import StoreError, make_batches, open_batches, open_store, prefetch
from sympow_jax.input_pipeline.batches import BatchSource
from sympow_jax.input_pipeline.opening import open_data, parse_mixture
from tests.input_pipeline.stores import random_tokens, write_store

SHAPE = (21, 70)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("stores")
    shapes = {"a": SHAPE, "b": (9, 64)}
    return [
        open_store(str(write_store(folder / f"{name}.zarr", random_tokens(rng, shape), chunks=(8, 32))))
        for name, shape in shapes.items()
    ]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_inputs_are_targets_shifted_with_bos_in_front(stores):
    batches = make_batches(stores[0], seq_len=20, batch_size=7)
    tokens = stores[0].read(slice(0, 21), slice(0, 70))
    for step, (rows, columns) in enumerate(
        [
            (slice(0, 7), slice(0, 20)),
            (slice(7, 14), slice(0, 20)),
            (slice(14, 21), slice(0, 20)),
            (slice(0, 7), slice(20, 40)),
        ]
    ):
        batch = batches[step]
        np.testing.assert_array_equal(batch["targets"], tokens[rows, columns])
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert (batch["inputs"][:, 0] == 256).all()
        assert {values.dtype for values in batch.values()} == {np.dtype(np.int32)}


@settings(max_examples=30, deadline=None)
@given(
    seq_len=st.sampled_from([1, 7, 16, 33, 64]),
    order=st.sampled_from(["rectangle", "shuffled_chunks"]),
    mixed=st.booleans(),
    step=st.integers(0, 200),
    seed=st.integers(0, 3),
)
def test_hosts_share_one_global_batch(stores, seq_len, order, mixed, step, seed):
    chosen = stores if mixed else stores[:1]

    def batch(process_index, process_count):
        return make_batches(
            chosen,
            seq_len=seq_len,
            batch_size=8,
            order=order,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )[step]

    whole = batch(0, 1)
    for count in (2, 4):
        parts = [batch(index, count) for index in range(count)]
        assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


@pytest.mark.parametrize("mixed", [False, True])
def test_any_prefetch_and_a_restart_at_every_step_give_the_same_batches(stores, mixed):
    batches = make_batches(stores if mixed else stores[0], seq_len=16, batch_size=4, order="shuffled_chunks", seed=5)
    straight = [batches[step] for step in range(25)]
    for depth, threads in [(0, 0), (1, 1), (8, 3)]:
        read = prefetch(batches, 0, 25, prefetch_batches=depth, num_threads=threads)
        steps, found = zip(*read, strict=True)
        assert steps == tuple(range(25))
        for first, second in zip(found, straight, strict=True):
            assert_equal(first, second)
        read.close()
    for start in range(25):
        read = prefetch(batches, start, 10**12)
        for step, batch in itertools.islice(read, 2):
            assert_equal(batch, batches[step])
        read.close()


def test_a_failed_read_surfaces_at_its_batch_and_leaves_no_threads(tmp_path, rng):
    path = write_store(tmp_path / "a.zarr", random_tokens(rng, SHAPE), chunks=(7, 35))
    store = open_store(str(path))
    (path / "1.0").unlink()
    before = threading.active_count()
    read = prefetch(make_batches(store, seq_len=35, batch_size=7), 0, 10**6)
    assert next(read)[0] == 0
    start = time.perf_counter()
    with pytest.raises(StoreError, match=r"chunk 1\.0 is missing"):
        next(read)
    assert time.perf_counter() - start < 5
    read.close()
    deadline = time.perf_counter() + 5
    while threading.active_count() > before and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


class Slow(BatchSource):
    """A source that takes a while for each batch."""

    def __getitem__(self, step):
        time.sleep(0.02)
        return {"inputs": np.full((1, 1), step, np.int32)}


def test_wait_fraction_tells_waiting_from_working():
    waiting = prefetch(Slow(), 0, 100, prefetch_batches=0, num_threads=0)
    for _ in range(5):
        next(waiting)
    assert waiting.wait_fraction() > 0.8
    assert waiting.wait_fraction() == 0.0  # of the time since the last call
    waiting.close()
    working = prefetch(Slow(), 0, 100, prefetch_batches=8, num_threads=4)
    next(working)
    time.sleep(0.3)
    working.wait_fraction()
    for _ in range(5):
        next(working)
        time.sleep(0.05)
    assert working.wait_fraction() < 0.3
    working.close()


def test_description_names_what_was_read(stores):
    batches = make_batches(
        stores, seq_len=16, batch_size=6, order="shuffled_chunks", seed=1, process_index=1, process_count=2
    )
    batch = batches[11]
    described = batches.describe(11)
    assert {entry["store"] for entry in described} == {store.address for store in stores}
    for entry, targets in zip(described, batch["targets"], strict=True):
        store = next(store for store in stores if store.address == entry["store"])
        row, columns = entry["row"], slice(*entry["columns"])
        np.testing.assert_array_equal(store.read(slice(row, row + 1), columns)[0], targets)
        assert entry["documents"] == [row]
        assert entry["text"] == store.tokenizer.decode(targets)


def test_epochs_are_counted(stores):
    batches = make_batches(stores[0], seq_len=35, batch_size=6)
    assert batches.epoch(7) == pytest.approx(1.0)
    assert_equal(batches[0], batches[7])


def test_equal_stores_of_a_mixture_are_read_in_different_orders(stores):
    batches = make_batches([stores[0], stores[0]], seq_len=32, batch_size=8, order="shuffled_chunks")
    read = {0: [], 1: []}
    for step in range(9):
        for store, run, _ in batches.runs(step):
            read[store] += [(row, run.block) for row in range(run.start, run.stop)]
    length = min(map(len, read.values()))
    assert length > 20 and read[0][:length] != read[1][:length]


def test_the_epoch_of_a_mixture_is_that_of_the_store_repeated_most(stores):
    """42 sequences of 32 in the first store, 18 in the second, read equally often: 8 of 16 a step."""
    assert make_batches(stores, seq_len=32, batch_size=16).epoch(9) == pytest.approx(9 * 8 / 18)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 71}, r"data.seq_len = 71: .* documents of 70 tokens; use 1..70"),
        ({"seq_len": 0}, "data.seq_len = 0"),
        ({"batch_size": 0}, "data.batch_size = 0: must be a positive multiple"),
        ({"batch_size": 3, "process_count": 2}, "data.batch_size = 3: must be a positive multiple of the 2 processes"),
        ({"order": "random"}, "data.order = 'random': legal are rectangle, shuffled_chunks"),
        ({"weights": [1.0, 2.0]}, "one positive weight for each of the 1 stores is needed"),
        ({"weights": [float("nan")]}, "one positive weight"),
        ({"weights": [float("inf")]}, "one positive weight"),
    ],
)
def test_wrong_options_are_one_line(stores, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_batches(stores[0], **{"seq_len": 8, "batch_size": 2, **options})
    assert "\n" not in str(caught.value)


def test_mixed_stores_must_share_a_tokenizer(stores, tmp_path, rng):
    path = write_store(tmp_path / "c.zarr", random_tokens(rng, SHAPE), chunks=(8, 32), vocab_size=300)
    with pytest.raises(ValueError, match=r"vocab_size is 257 in .* and 300 in"):
        make_batches([stores[0], open_store(str(path))], seq_len=8, batch_size=2)


@pytest.mark.parametrize(
    ("spec", "names", "weights"),
    [
        ("a.zarr@3, s3://u@b/c ,d", ["a.zarr", "s3://u@b/c", "d"], [3.0, 1.0, 1.0]),
        (r"a\,b@2,c\@3@0.5,d\@4", ["a,b", "c@3", "d@4"], [2.0, 0.5, 1.0]),
        (r"s3://u\@7/c", ["s3://u@7/c"], [1.0]),
        ("a@b@2", ["a@b"], [2.0]),
        ("tfds:x?split=train[:10%]+test&data_dir=/d@5,y", ["tfds:x?split=train[:10%]+test&data_dir=/d", "y"], [5, 1]),
    ],
)
def test_mixtures_are_spelt_with_weights(spec, names, weights):
    assert parse_mixture(spec) == (names, weights)


def test_names_with_commas_and_ats_are_opened_escaped_and_never_mistaken(tmp_path, rng):
    shapes = {"run": (4, 32), "run@2": (5, 32), "run,run": (6, 32), "run@x": (7, 32)}
    for name, shape in shapes.items():
        write_store(tmp_path / name, random_tokens(rng, shape), chunks=(2, 32))
    here = str(tmp_path / "run")
    for escaped, rows in [(rf"{here}\@2", 5), (rf"{here}\,run", 6), (f"{here}@x", 7), (f"{here}@2.0", 4)]:
        assert open_data(escaped, "train", seq_len=32).num_documents == rows
    batches = open_batches(rf"{here}\@2@3,{here}@1", "train", seq_len=32, batch_size=4)
    assert [store.num_documents for store in batches.stores] == [5, 4] and batches.mixture.weights == (3.0, 1.0)
    for opened in (open_data, lambda *names, **options: open_batches(*names, batch_size=2, **options)):
        with pytest.raises(StoreError, match=r"has this name, which also reads as a mixture .* write '.*run\\@2'"):
            opened(f"{here}@2", "train", seq_len=32)
        with pytest.raises(StoreError, match=r"write '.*run\\,run'"):
            opened(f"{here},run", "train", seq_len=32)
        for empty in ("", " ", f"{here},", f",{here}", "@2"):
            with pytest.raises(StoreError, match="a store without a name"):
                opened(empty, "train", seq_len=32)
    with pytest.raises(StoreError, match="a mixture of 2 stores, where one store is needed"):
        open_data(f"{here}@x,{here}", "train", seq_len=32)


def test_data_are_opened_by_name(tmp_path, rng, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_data("python-stdlib", "heldout", seq_len=512).document_length == 8192
    random_tokens(rng, (100,)).tofile(tmp_path / "a.bin")
    assert open_data(str(tmp_path / "a.bin"), "train", seq_len=10).num_documents == 1
    write_store(tmp_path / "made" / "train.zarr", random_tokens(rng, SHAPE), chunks=(8, 32))
    name = str(tmp_path / "made")
    batches = open_batches(f"{name}@2,{name}/train.zarr@1", "train", seq_len=32, batch_size=3)
    assert [store.num_documents for store in batches.stores] == [21, 21]
    assert batches.mixture.weights == (2.0, 1.0)
    assert "the last 6 tokens of each document are not used" in caplog.text
    with pytest.raises(StoreError, match=r"data.heldout = '.*made': heldout.zarr has no rows"):
        open_data(name, "heldout", seq_len=32)
