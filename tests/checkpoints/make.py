"""Trains the small runs kept in this folder, and records what evaluating and continuing them gives; see README.md.

python -m tests.checkpoints.make              trains six runs and keeps them: only for another set of variants
python -m tests.checkpoints.make --record     records anew what the kept runs give, after a change that is meant
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

import tests.conftest  # noqa: F401  (the flags of the compiler, before JAX is imported)

# isort: split
import jax
import numpy as np

from sympow_jax.config import Config, parse_flags
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.loading import load_step
from sympow_jax.training import loop
from sympow_jax.variants import LINEAR_KERNELS
from sympow_jax.variants import VARIANTS as VARIANTS_TABLE
from tests.input_pipeline.stores import write_store

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
VARIANTS = ("softmax_rope", "softmax_fire", "fox", "conformal_sympow", "based", "rebased")
DATA = "tests/checkpoints/data"
RUNS, EVALUATION, CONTINUED, PLATFORM = (
    HERE / name for name in ("runs.tar.xz", "evaluation.npz", "continued.json", "platform.json")
)
STEPS, MORE_STEPS = 6, 3
LENGTHS = (32, 64, 128)
CPU = ("vendor_id", "cpu family", "model", "flags")  # what XLA, LLVM and the libraries of products choose code by
FLAGS = {
    "model.embed_dim": 8, "model.num_heads": 2, "model.head_dim": 8, "model.mlp_dim": 16, "model.init_std": 0.2,
    "model.scan_layers": True, "attention.feature_dim": 4, "attention.window": 8, "attention.chunk_size": 16,
    "data.train": DATA, "data.heldout": DATA, "data.seq_len": 32, "data.batch_size": 2, "mesh.data": 1,
    "optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 2, "num_train_steps": STEPS,
    "evaluation.every_steps": 0, "evaluation.num_batches": 2, "evaluation.lengths": ",".join(map(str, LENGTHS)),
    "evaluation.num_documents": 3, "evaluation.chunk_size": 32, "checkpoint.every_steps": STEPS,
    "checkpoint.keep_last": 1, "logging.every_steps": 1, "logging.tensorboard": "false", "logging.peak_flops": 1e12,
}  # fmt: skip


def this_platform() -> dict[str, str]:
    """What the last bits of a result depend on."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {"jax": jax.__version__} | {name: found.get(name, "unknown") for name in CPU}


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """The settings of JAX that the runs were trained, evaluated and continued under."""
    settings = {"jax_disable_most_optimizations": True, "jax_numpy_dtype_promotion": "standard"}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def unpack(folder: pathlib.Path) -> None:
    """The kept runs, as folders named by their variant."""
    with tarfile.open(RUNS) as archive:
        archive.extractall(folder, filter="data")


def evaluate(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Loss sums of each document, and counts, as in the npz of eval.py, for the run in `workdir`."""
    store = open_data(str(ROOT / DATA), "heldout", seq_len=max(LENGTHS))
    with as_recorded():
        model, params, _ = load_step(str(workdir))
        options: dict[str, Any] = {"train_length": 32, "num_documents": 3, "chunk_size": 32, "window": 32, "stride": 16}
        return length_generalisation(model, params, store, lengths=LENGTHS, num_targets=16, **options)[1]


def config(variant: str, steps: int = STEPS) -> Config:
    """Of a very small model, on the data in this folder."""
    depth = 3 if variant == "based" else 2
    implementation = "chunked" if VARIANTS_TABLE[variant].kernel in LINEAR_KERNELS else "blockwise"
    changes = {"model.num_layers": depth, "num_train_steps": steps, "attention.implementation": implementation}
    flags = [f"--config.{name}={value}" for name, value in {**FLAGS, **changes}.items()]
    return parse_flags([f"--config={ROOT}/configs/quickstart.py:{variant}", *flags])


def train(variant: str, workdir: pathlib.Path, steps: int = STEPS) -> list[dict[str, float]]:
    """A run of `steps` steps, begun or continued; its rows of loss and gradient norm."""
    with as_recorded():
        loop.train(config(variant, steps), str(workdir))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


def write_data() -> None:
    """Words of a made-up language, as counter-based random numbers: the same on every machine."""
    random = np.random.Philox(key=[7, 7]).random_raw(20_000)
    words = [random[i : i + 2 + i % 5] % np.uint64(26) for i in range(0, 120, 3)]
    text = np.concatenate([np.append(words[int(r % np.uint64(40))], np.uint64(26)) for r in random[1000:4000]])
    tokens = text[: 32 * 128].reshape(32, 128).astype("<u2")
    shutil.rmtree(ROOT / DATA, ignore_errors=True)
    for split, rows in (("train", tokens[:24]), ("heldout", tokens[24:])):
        write_store(ROOT / DATA / f"{split}.zarr", rows, chunks=(8, 64), vocab_size=32, bos_id=31)
        shutil.rmtree(ROOT / DATA / f"{split}.ledger")


def keep_runs(folder: pathlib.Path) -> None:
    """Trains all variants and packs what they wrote."""
    write_data()
    with tarfile.open(RUNS, "w:xz") as archive:
        for variant in VARIANTS:
            train(variant, folder / variant)
            archive.add(folder / variant, arcname=variant)


def record(folder: pathlib.Path) -> None:
    """Evaluates and continues the kept runs, and writes what they give."""
    unpack(folder)
    evaluations, continued = {}, {}
    for variant in VARIANTS:
        evaluations |= {f"{variant}/{name}": array for name, array in evaluate(folder / variant).items()}
        continued[variant] = train(variant, folder / variant, STEPS + MORE_STEPS)[STEPS:]
    np.savez_compressed(EVALUATION, **evaluations)
    CONTINUED.write_text(json.dumps(continued, indent=1) + "\n")
    PLATFORM.write_text(json.dumps(this_platform(), indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """Keeps or records."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        (record if "--record" in arguments else keep_runs)(pathlib.Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
