"""What an evaluation refuses before it measures."""

import dataclasses
import pathlib

import numpy as np
import pytest

from sympow_jax import eval as eval_command
from sympow_jax import evaluate, sweep, train
from sympow_jax.command_line import one_line_errors
from sympow_jax.config import ConfigError, parse_flags
from sympow_jax.evaluate import EvaluationRequest
from sympow_jax.files import write_json_atomic
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer, IdTokenizer
from sympow_jax.models.model import Model
from sympow_jax.training.workdir import WorkdirError, WorkdirLock
from tests.evals.toy import make_store
from tests.input_pipeline.stores import write_store
from tests.models.small import tiny_config
from tests.plots.results import length_result

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def workdir(tmp_path):
    """A run on bytes, as far as it is looked at before anything is loaded."""
    config = parse_flags([f"--config={ROOT}/configs/quickstart.py:fox"])
    write_json_atomic(tmp_path / "run" / "config.json", dataclasses.asdict(config))
    ByteTokenizer().save(tmp_path / "run" / "tokenizer")
    return str(tmp_path / "run")


def request(workdir: str, store: pathlib.Path, task: str) -> EvaluationRequest:
    return EvaluationRequest(workdir, task, (16,), str(store), "x", num_documents=1, num_examples=1, depths=(0.5,))


@pytest.mark.parametrize("task", ["length_generalisation", "needle"])
def test_a_store_of_another_tokenizer_is_refused_and_the_way_out_is_named(workdir, tmp_path, task):
    store = write_store(tmp_path / "other.zarr", np.zeros((4, 16), "<u2"), chunks=(4, 16))
    IdTokenizer(257).save(store / "tokenizer")  # as many ids, and another meaning
    with pytest.raises(ConfigError, match=r"its tokeniser \(digest .* is not .*--tokenizer=.*run/tokenizer"):
        evaluate.evaluate(request(workdir, store, task))


def test_a_store_of_the_same_tokenizer_is_taken(workdir, tmp_path):
    store = write_store(tmp_path / "same.zarr", np.zeros((4, 16), "<u2"), chunks=(4, 16))
    ByteTokenizer().save(store / "tokenizer")
    evaluate._check_tokenizer(request(workdir, store, "needle"), evaluate.open_data(str(store), "heldout", seq_len=16))


def test_two_evaluations_never_write_the_same_result(workdir, tmp_path):
    """Another name is another result."""
    store = write_store(tmp_path / "other.zarr", np.zeros((4, 16), "<u2"), chunks=(4, 16))
    IdTokenizer(257).save(store / "tokenizer")  # where an evaluation that may begin ends
    pathlib.Path(workdir, "eval").mkdir()
    with WorkdirLock(f"{workdir}/eval", name=".x.lock"):
        with pytest.raises(WorkdirError, match=r"--name=x: \S+/eval/x\.json is already in use"):
            evaluate.evaluate(request(workdir, store, "needle"))
        with pytest.raises(ConfigError, match="its tokeniser"):
            evaluate.evaluate(dataclasses.replace(request(workdir, store, "needle"), name="y"))
    with pytest.raises(ConfigError, match="its tokeniser"):
        evaluate.evaluate(request(workdir, store, "needle"))


def test_what_is_no_number_in_the_file_is_none_on_the_screen(tmp_path, monkeypatch, capsys):
    result, nan = length_result(), float("nan")
    result["same_target_change"]["ci95"] = [[nan, nan]] * 4  # of documents that all have one source
    monkeypatch.setattr(evaluate, "length_generalisation", lambda *_, **__: (result, {"document_ids": np.zeros(1)}))
    monkeypatch.setattr(evaluate, "read_documents", lambda *_: np.zeros((1, 1)))
    monkeypatch.setattr(evaluate, "distance_curves", lambda *_, **__: {"layers": []})
    asked, model = request(str(tmp_path), tmp_path, "length_generalisation"), Model(tiny_config("softmax_rope"), 257)
    evaluate._lengths(asked, model, {}, make_store(), {}, {"inputs": {}})
    printed = capsys.readouterr().out
    assert "too few source documents for an interval" in printed and "nan" not in printed


@pytest.mark.parametrize("task", ["length_generalisation", "passkey"])
def test_more_tokens_than_a_table_of_positions_has_rows_are_refused(tmp_path, task):
    config = parse_flags(
        [f"--config={ROOT}/configs/quickstart.py:softmax_absolute", "--config.position.max_length=4096"]
    )
    write_json_atomic(tmp_path / "run" / "config.json", dataclasses.asdict(config))
    asked = dataclasses.replace(request(str(tmp_path / "run"), tmp_path, task), lengths=(16, 4097))
    with pytest.raises(ConfigError, match="--lengths = 4097: learned_absolute has positions for 4096 tokens"):
        evaluate.evaluate(asked)
    assert not (tmp_path / "run" / "eval").exists()


def test_scaling_that_does_nothing_is_refused_by_every_command(workdir, tmp_path, capsys):
    """dynamic_ntk up to the trained length in an evaluation; a factor of 1 in new runs. Nothing is written."""
    config = tiny_config("softmax_rope")
    write_json_atomic(f"{workdir}/config.json", dataclasses.asdict(config))

    def refused(run, *flags):
        assert one_line_errors(run, flags) == 1
        return capsys.readouterr().err

    length = config.position.original_length
    dynamic = (f"--workdir={workdir}", "--position.scaling=dynamic_ntk", "--position.factor=2")
    said = f"has no effect up to position.original_length = {length}; ask for longer --lengths than {length}"
    assert said in refused(eval_command.run, *dynamic, f"--lengths=8,{length}")
    assert not (pathlib.Path(workdir) / "eval").exists()
    assert "has no effect" not in refused(eval_command.run, *dynamic, f"--lengths=8,{length + 1}")
    scaled = ("--config.position.scaling=yarn", "--config.position.factor=1")
    quickstart = f"--config={ROOT}/configs/quickstart.py"
    new = refused(train.run, f"{quickstart}:softmax_rope", f"--workdir={tmp_path}/new", *scaled)
    swept = refused(sweep.run, quickstart, "--variants=softmax_rope", f"--root={tmp_path}/root", *scaled)
    for error in (new, swept):
        assert "position.factor = 1.0: position.scaling = 'yarn' changes nothing with it" in error
    assert not (tmp_path / "new").exists() and not (tmp_path / "root").exists()
