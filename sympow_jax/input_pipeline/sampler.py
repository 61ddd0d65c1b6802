"""Which rectangle of which store is sequence n: pure functions of (seed, n), no state.

Sequence n counts sequences over all hosts and steps: step k of a global batch of B holds n = kB .. kB + B - 1. So the
same n is the same tokens whatever the number of hosts or moment of a restart, and, but for the order "stream", whose
rows go on from batch to batch, whatever the batch size.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from sympow_jax.input_pipeline.hashing import permutation

ORDERS = ("rectangle", "shuffled_chunks", "stream")
MIXTURE_BLOCK = 1024  # weights are kept exactly, to one sequence, in each block of this many


class Run(NamedTuple):
    """Consecutive rows [start, stop) at one column block."""

    start: int
    stop: int
    block: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """A store cut into sequences: rows x column blocks of `seq_len`; columns past the last whole block are not used."""

    num_rows: int
    num_blocks: int
    seq_len: int
    chunks: tuple[int, int]

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch."""
        return self.num_rows * self.num_blocks


def rectangle_runs(grid: Grid, start: int, stop: int) -> list[Run]:
    """LongCrawl64's order: all rows of the first column block, then all rows of the next; epochs repeat it."""
    runs = []
    while start < stop:
        block, row = divmod(start % grid.num_sequences, grid.num_rows)
        count = min(grid.num_rows - row, stop - start)
        runs.append(Run(row, row + count, block))
        start += count
    return runs


def shuffled_runs(grid: Grid, start: int, stop: int, *, seed: int) -> list[Run]:
    """Chunks in an order drawn from (seed, epoch); inside a chunk rows first, then columns.

    Where one chunk is all, its sequences are drawn one by one: all of it is in the cache anyway.
    """
    runs = []
    while start < stop:
        epoch, inside = divmod(start, grid.num_sequences)
        units, ends = _unit_order(grid, seed, epoch)
        if len(units) == 1:
            block, row = divmod(int(_sequence_order(grid, seed, epoch)[inside]), grid.num_rows)
            runs.append(Run(row, row + 1, block))
            start += 1
            continue
        place = int(np.searchsorted(ends, inside, side="right"))
        row_start, row_stop, block_start, block_stop = _unit_bounds(grid, int(units[place]))
        height = row_stop - row_start
        offset = inside - (int(ends[place]) - height * (block_stop - block_start))
        block, row = divmod(offset, height)
        count = min(height - row, stop - start)
        runs.append(Run(row_start + row, row_start + row + count, block_start + block))
        start += count
    return runs


def stream_runs(grid: Grid, start: int, stop: int, *, batch_size: int) -> list[Run]:
    """Row r of a batch goes on with the document of row r of the batch before; at their ends all rows begin others."""
    runs = []
    while start < stop:
        step, slot = divmod(start, batch_size)
        group, block = divmod(step, grid.num_blocks)
        row = (group * batch_size + slot) % grid.num_rows
        count = min(batch_size - slot, grid.num_rows - row, stop - start)
        runs.append(Run(row, row + count, block))
        start += count
    return runs


def runs(grid: Grid, start: int, stop: int, *, order: str, seed: int, batch_size: int) -> list[Run]:
    """Sequences start..stop-1 in the named order."""
    if order == "rectangle":
        return rectangle_runs(grid, start, stop)
    if order == "stream":
        return stream_runs(grid, start, stop, batch_size=batch_size)
    return shuffled_runs(grid, start, stop, seed=seed)


@functools.lru_cache(maxsize=16)
def _group_starts(grid: Grid) -> np.ndarray:
    """First column block of each group; a group is the blocks that start in the same column of chunks."""
    chunk = np.arange(grid.num_blocks) * grid.seq_len // grid.chunks[1]
    return np.flatnonzero(np.diff(chunk, prepend=-1))


def _unit_bounds(grid: Grid, unit: int) -> tuple[int, int, int, int]:
    """Rows [start, stop) and column blocks [start, stop) of a unit, a row-chunk times a group of column blocks."""
    groups = _group_starts(grid)
    row_chunk, group = divmod(unit, len(groups))
    row = row_chunk * grid.chunks[0]
    end = int(groups[group + 1]) if group + 1 < len(groups) else grid.num_blocks
    return row, min(row + grid.chunks[0], grid.num_rows), int(groups[group]), end


@functools.lru_cache(maxsize=4)
def _sequence_order(grid: Grid, seed: int, epoch: int) -> np.ndarray:
    """Every sequence, in the order of this epoch."""
    return permutation(seed, epoch, grid.num_sequences)


@functools.lru_cache(maxsize=16)
def _unit_order(grid: Grid, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Units in the order of this epoch, and the number of sequences up to the end of each."""
    row_chunks = -(-grid.num_rows // grid.chunks[0])
    heights = np.minimum(grid.chunks[0], grid.num_rows - np.arange(row_chunks) * grid.chunks[0])
    widths = np.diff(_group_starts(grid), append=grid.num_blocks)
    sizes = (heights[:, None] * widths[None, :]).reshape(-1)
    units = permutation(seed, epoch, len(sizes))
    return units, np.cumsum(sizes[units])


class Share(NamedTuple):
    """Sequences [start, stop) of one store, and the places that they take in the batch."""

    store: int
    start: int
    stop: int
    slots: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sequence n -> (store, its own running number): each block of MIXTURE_BLOCK holds the stores in fixed counts."""

    weights: tuple[float, ...]
    seed: int

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Sequences of each store in a block, by largest remainder, [stores]."""
        ideal = np.asarray(self.weights, np.float64) / sum(self.weights) * MIXTURE_BLOCK
        counts = np.floor(ideal).astype(np.int64)
        order = np.argsort(-(ideal - counts), kind="stable")
        counts[order[: MIXTURE_BLOCK - int(counts.sum())]] += 1
        return counts

    def split(self, start: int, stop: int) -> list[Share]:
        """The stores' shares of sequences start..stop-1."""
        if len(self.weights) == 1:
            return [Share(0, start, stop, np.arange(stop - start))]
        shares = []
        for block in range(start // MIXTURE_BLOCK, -(-stop // MIXTURE_BLOCK)):
            assigned = np.repeat(np.arange(len(self.weights)), self.counts)
            assigned = assigned[permutation(self.seed, block, MIXTURE_BLOCK)]
            first = max(start - block * MIXTURE_BLOCK, 0)
            last = min(stop - block * MIXTURE_BLOCK, MIXTURE_BLOCK)
            for store in np.unique(assigned[first:last]).tolist():
                mine = np.flatnonzero(assigned[first:last] == store)
                begin = block * int(self.counts[store]) + int((assigned[:first] == store).sum())
                shares.append(Share(store, begin, begin + len(mine), mine + first + block * MIXTURE_BLOCK - start))
        return shares
