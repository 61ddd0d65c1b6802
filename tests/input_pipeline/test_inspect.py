"""`python -m sympow_jax.inspect --workdir=DIR --batch=N`: what batch N of a run was."""

import json
import shutil

import numpy as np

from sympow_jax import inspect
from sympow_jax.command_line import one_line_errors
from sympow_jax.config import parse_flags
from sympow_jax.training.data import open_run_data
from sympow_jax.training.run_files import save_run_files
from tests.input_pipeline.stores import random_tokens, write_store
from tests.models.small import ROOT, tiny_config


def test_a_model_that_reads_no_stream_is_said_to_read_none(capsys):
    inspect.print_config(tiny_config("sympow", "attention.position=fire"), 257)
    assert "reads no stream, since a linear kernel with an additive bias" in capsys.readouterr().out
    inspect.print_config(tiny_config("sympow"), 257)
    assert "decoding state of one stream of 24 tokens" in capsys.readouterr().out


def test_the_printed_batch_is_the_one_that_training_reads(tmp_path, rng, capsys):
    for name in "ab":
        write_store(tmp_path / f"{name}.zarr", random_tokens(rng, (9, 70)), chunks=(4, 32))
    data = {"train": f"{tmp_path}/a.zarr@3,{tmp_path}/b.zarr", "heldout": f"{tmp_path}/b.zarr", "seq_len": 20}
    flags = [*(f"--config.data.{k}={v}" for k, v in data.items()), "--config.data.order=shuffled_chunks"]
    config = parse_flags([f"--config={ROOT}/configs/quickstart.py", "--config.evaluation.lengths=20", *flags])
    run, workdir = open_run_data(config), str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    save_run_files(config, workdir, run)
    assert one_line_errors(inspect.run, [f"--workdir={workdir}", "--batch=81234"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    _, batch = next(run.prefetch(81234, 81235))
    assert len(lines) == config.data.batch_size and {line["store"][-6:] for line in lines} == {"a.zarr", "b.zarr"}
    for line, targets in zip(lines, batch["targets"], strict=True):
        assert line["text"] == run.tokenizer.decode(targets)
    shutil.rmtree(tmp_path / "b.ledger")
    write_store(tmp_path / "b.zarr", np.zeros((9, 70), "<u2"), chunks=(4, 32))
    assert one_line_errors(inspect.run, [f"--workdir={workdir}", "--batch=81234"]) == 1
    assert "data.heldout_digest: the run in" in capsys.readouterr().err
