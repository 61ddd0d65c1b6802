import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sympow_jax.input_pipeline.hashing import permutation, random_bits
from sympow_jax.input_pipeline.sampler import MIXTURE_BLOCK, ORDERS, Grid, Mixture, runs

GRIDS = st.builds(
    Grid,
    num_rows=st.integers(1, 30),
    num_blocks=st.integers(1, 9),
    seq_len=st.integers(1, 12),
    chunks=st.tuples(st.integers(1, 12), st.integers(1, 20)),
)


def sequences(grid, start, stop, order, seed=0):
    """(row, block) of each sequence."""
    return [
        (row, run.block)
        for run in runs(grid, start, stop, order=order, seed=seed, batch_size=1)
        for row in range(run.start, run.stop)
    ]


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS, order=st.sampled_from(ORDERS[:2]), seed=st.integers(0, 5), batch=st.integers(1, 40))
def test_each_epoch_has_every_sequence_once_and_batches_cut_one_line(grid, order, seed, batch):
    total = grid.num_sequences
    line = sequences(grid, 0, 3 * total, order, seed)
    everything = {(row, block) for row in range(grid.num_rows) for block in range(grid.num_blocks)}
    for epoch in range(3):
        part = line[epoch * total : (epoch + 1) * total]
        assert len(part) == len(set(part))
        assert set(part) == everything
    cut = [
        pair
        for start in range(0, len(line) - batch, batch)
        for pair in sequences(grid, start, start + batch, order, seed)
    ]
    assert cut == line[: len(cut)]


def test_rectangle_order_is_longcrawl64s():
    """Rows first, then columns, as its own loader reads them."""
    grid = Grid(num_rows=6, num_blocks=3, seq_len=4, chunks=(4, 8))
    naive = [(row, block) for block in range(3) for row in range(6)]
    assert sequences(grid, 0, 18, "rectangle") == naive


def test_shuffled_order_stays_in_a_chunk_and_changes_with_seed_and_epoch():
    grid = Grid(num_rows=20, num_blocks=8, seq_len=4, chunks=(5, 8))
    lines = [sequences(grid, start, start + 160, "shuffled_chunks", seed) for start, seed in [(0, 0), (160, 0), (0, 1)]]
    assert len({tuple(line) for line in lines}) == 3
    chunks = [(row // 5, block // 2) for row, block in lines[0]]
    assert sum(a != b for a, b in itertools.pairwise(chunks)) == 15
    assert lines[0][:6] == [(lines[0][0][0] + i % 5, lines[0][0][1] + i // 5) for i in range(6)]


@pytest.mark.parametrize(("chunks", "seq_len"), [((50, 64), 8), ((20, 32), 8), ((20, 8), 32)])
def test_one_chunk_is_shuffled_by_sequences(chunks, seq_len):
    """Also where several chunks lie under each sequence, so that the chunks can have but one order."""
    grid = Grid(num_rows=20, num_blocks=32 // seq_len, seq_len=seq_len, chunks=chunks)
    total = grid.num_sequences
    starts = [(0, 0), (total, 0), (0, 1)]
    lines = [sequences(grid, start, start + total, "shuffled_chunks", seed) for start, seed in starts]
    assert len({tuple(line) for line in lines}) == 3
    for line in lines:
        in_order = sorted(line, key=lambda pair: pair[::-1])
        assert len(set(line)) == total
        assert sum(a == b for a, b in zip(line, in_order, strict=True)) < total / 4
    whole = sequences(grid, 0, 3 * total, "shuffled_chunks")
    assert sequences(grid, total // 2, 2 * total + 3, "shuffled_chunks") == whole[total // 2 : 2 * total + 3]


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=4), start=st.integers(0, 5000), size=st.integers(1, 3000)
)
def test_mixture_splits_are_pieces_of_one_line(weights, start, size):
    mixture = Mixture(tuple(weights), seed=3)
    line = assignment(mixture, 0, start + size)
    assert assignment(mixture, start, start + size) == line[start:]
    for store in range(len(weights)):
        numbers = [number for which, number in line if which == store]
        assert numbers == list(range(len(numbers)))


def assignment(mixture, start, stop):
    """(store, number in the store) of each sequence."""
    found = [None] * (stop - start)
    for share in mixture.split(start, stop):
        for slot, number in zip(share.slots.tolist(), range(share.start, share.stop), strict=True):
            assert found[slot] is None
            found[slot] = (share.store, number)
    return found


def test_mixture_keeps_its_weights():
    mixture = Mixture((3.0, 1.0), seed=0)
    which = [store for store, _ in assignment(mixture, 0, 4 * MIXTURE_BLOCK)]
    assert which.count(0) == 3 * MIXTURE_BLOCK
    assert 0.6 < which[:200].count(0) / 200 < 0.9


def test_every_block_of_a_mixture_has_an_order_of_its_own():
    which = [store for store, _ in assignment(Mixture((1.0, 1.0), seed=0), 0, 2 * MIXTURE_BLOCK)]
    first, second = which[:MIXTURE_BLOCK], which[MIXTURE_BLOCK:]
    assert sorted(first) == sorted(second) and first != second


def test_what_weights_leave_over_goes_to_the_largest_remainders():
    """1,024 times 0.5, 0.3 and 0.2: 512, 307.2 and 204.8."""
    assert Mixture((5.0, 3.0, 2.0), seed=0).counts.tolist() == [512, 307, 205]


def test_random_bits_never_change():
    """Runs are resumed by seed and step alone, on other machines and versions."""
    assert [hex(x) for x in random_bits(7, 3, 2).tolist()] == ["0x4f2e46b65e21487f", "0xcd6bf78ede9161e1"]
    np.testing.assert_array_equal(np.sort(permutation(1, 2, 100)), np.arange(100))


@pytest.mark.parametrize("order", ORDERS)
def test_orders_have_random_access_at_longcrawl64s_size(order):
    grid = Grid(num_rows=6_609_334, num_blocks=64, seq_len=1024, chunks=(2048, 2048))
    far = 3 * grid.num_sequences + 12_345_678
    assert sum(run.stop - run.start for run in runs(grid, far, far + 512, order=order, seed=0, batch_size=512)) == 512
