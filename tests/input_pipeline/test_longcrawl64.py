"""A store with LongCrawl64's exact metadata, trained on, evaluated and inspected at its full length by the commands."""

import json
import pathlib

import jax
import numpy as np
import pytest
import zarr

from sympow_jax import eval as eval_command
from sympow_jax import inspect, train
from sympow_jax.input_pipeline import open_store
from tests.input_pipeline.stores import random_tokens, write_store

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTH = 65536


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["prepare", "zarr-python"])
def test_a_store_of_longcrawl64s_layout_trains_and_evaluates_at_its_length(tmp_path, rng, writer, monkeypatch, capsys):
    # one whole row of chunks and a ragged one; few ids, so that the model's output layer stays small
    tokens = np.resize(random_tokens(rng, (1_000_003,)), (2051, LENGTH))
    path = tmp_path / "train.zarr"
    if writer == "prepare":
        write_store(path, tokens, chunks=(2048, 2048))
    else:
        import numcodecs

        blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE, blocksize=0)
        array = zarr.create_array(
            path, shape=tokens.shape, chunks=(2048, 2048), dtype="<u2", zarr_format=2, compressors=blosc, fill_value=0
        )
        array[:] = tokens
        array.attrs.update({"vocab_size": 257, "bos_id": 256, "tokenizer": {"kind": "byte"}})
    np.testing.assert_array_equal(zarr.open_array(path, mode="r", zarr_format=2)[2040:], tokens[2040:])
    assert open_store(str(path)).num_documents == 2051
    for command in (train, eval_command):
        monkeypatch.setattr(command, "use_compilation_cache", lambda: None)
    workdir = f"--workdir={tmp_path / 'run'}"
    flags = {
        "model.num_layers": 1, "model.embed_dim": 8, "model.mlp_dim": 8, "model.num_heads": 1, "model.head_dim": 8,
        "mesh.data": 1,
        "data.train": path, "data.heldout": path, "data.seq_len": LENGTH, "data.batch_size": 1, "num_train_steps": 2,
        "optimizer.warmup_steps": 0, "evaluation.num_batches": 1, "logging.every_steps": 1, "logging.peak_flops": 1e12,
    }  # fmt: skip
    config = [f"--config={ROOT}/configs/quickstart.py", *(f"--config.{name}={value}" for name, value in flags.items())]
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        assert train.run([workdir, *config]) == 0
        options = [f"--lengths=16384,{LENGTH}", "--num_documents=2"]
        assert eval_command.run([workdir, *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert abs(losses[0] - np.log(257)) < 0.5 and losses[1] < losses[0]
    result = json.loads((tmp_path / "run" / "eval" / "length_generalisation.json").read_text())
    assert [row["length"] for row in result["lengths"]] == [16384, LENGTH]
    assert all(0 < row["nll"] < np.log(257) + 0.5 for row in result["same_target"])
    capsys.readouterr()
    inspect.print_batch(str(tmp_path / "run"), 1)
    described = json.loads(capsys.readouterr().out)
    assert (described["row"], described["columns"], described["documents"]) == (1, [0, LENGTH], [1])
    assert described["text"] == bytes(tokens[1].tolist()).decode("utf-8", "replace")
