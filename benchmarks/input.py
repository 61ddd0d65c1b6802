"""Tokens per second read from a warm local store in LongCrawl64's layout and order, beside zarr-python's own slicing.

    python benchmarks/input.py [--rows=2500] [--seconds=4]

The store is generated: 65,536 columns, 2048 x 2048 chunks, blosc lz4 level 5 with shuffle, <u2, a ragged row-chunk.
"pipeline" is what training gets: int32 inputs and targets, checked, through prefetch; "store" the rectangles alone.
All readers of a row read the same rectangles in the same order.
"""

import argparse
import itertools
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import zarr

from sympow_jax.input_pipeline import make_batches, open_store, prefetch
from sympow_jax.input_pipeline.batches import StoreBatches
from sympow_jax.input_pipeline.prepare.writer import Format, finish_store, write_array
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer

COLUMNS = 65536
TOKENS_PER_BATCH = 2**19  # half a million, as in the published runs at 65,536


def generate(folder: pathlib.Path, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    pool = (rng.zipf(1.2, size=2**24) % 50257).astype("<u2")

    def rows(start: int, stop: int) -> np.ndarray:
        starts = rng.integers(0, len(pool) - COLUMNS, stop - start)
        return np.stack([pool[s : s + COLUMNS] for s in starts])

    layout = Format((num_rows, COLUMNS), (2048, 2048))
    digests = write_array(folder, layout, rows, ledger=folder.with_suffix(".done"))
    attributes = {"vocab_size": 50257, "bos_id": 50256, "tokenizer": {"kind": "gpt2", "json_escape": True}}
    finish_store(folder, attributes=attributes, manifest={}, digests=digests, tokenizer=ByteTokenizer())


def tokens_per_second(batches: Iterable[int], seconds: float) -> float:
    """Tokens counted by `batches`, an iterable of numbers of tokens, over at least `seconds`."""
    start = time.perf_counter()
    total = 0
    for tokens in batches:
        total += tokens
        if time.perf_counter() - start > seconds:
            break
    return total / (time.perf_counter() - start)


def rectangles(source: StoreBatches) -> Iterable[tuple[slice, slice]]:
    for step in itertools.count():
        for _, run, _ in source.runs(step):
            yield slice(run.start, run.stop), slice(run.block * source.seq_len, (run.block + 1) * source.seq_len)


def readers(path: pathlib.Path, source: StoreBatches) -> dict[str, Callable[[], Iterable[int]]]:
    array = zarr.open_array(path, mode="r", zarr_format=2)
    store = source.stores[0]
    steps = 10**9
    return {
        "pipeline": lambda: (batch["targets"].size for _, batch in prefetch(source, 0, steps)),
        "store": lambda: (store.read(*rectangle).size for rectangle in rectangles(source)),
        "zarr-python": lambda: (np.asarray(array[rectangle]).size for rectangle in rectangles(source)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--store", help="folder to keep the generated store in (default: a temporary one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(flags.store or temporary) / "longcrawl64.zarr"
        if not path.exists():
            generate(path, flags.rows)
        print(f"{platform.machine()}, {os.cpu_count()} cores, zarr-python {zarr.__version__}, {flags.rows} x {COLUMNS}")
        print(f"{'length':>8} {'batch':>6} {'reader':>12} {'million tokens/s':>17} {'x zarr-python':>14}")
        for seq_len in (1024, 65536):
            source = make_batches(open_store(str(path)), seq_len=seq_len, batch_size=TOKENS_PER_BATCH // seq_len)
            rates = {name: tokens_per_second(reader(), flags.seconds) for name, reader in readers(path, source).items()}
            for name, rate in rates.items():
                ratio = rate / rates["zarr-python"]
                print(f"{seq_len:>8} {source.batch_size:>6} {name:>12} {rate / 1e6:>17.1f} {ratio:>14.1f}")


if __name__ == "__main__":
    main()
