"""Held-out measurements during training: the loss by position equals its definition, and reaches metrics.jsonl."""

import itertools
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from sympow_jax import eval as eval_command
from sympow_jax import train as train_command
from sympow_jax.command_line import one_line_errors
from sympow_jax.config import ConfigError
from sympow_jax.evals.length_generalisation import bin_edges, choose_documents, read_documents
from sympow_jax.evals.result_shape import read_result
from sympow_jax.input_pipeline.tokenizers import IdTokenizer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.data import open_run_data
from sympow_jax.training.heldout import Heldout
from sympow_jax.training.manifest import read_manifest
from sympow_jax.training.metrics import read_metrics
from tests.input_pipeline.stores import write_store
from tests.models.small import TINY, tiny_config


def store_flags(folder) -> tuple[str, ...]:
    tokens = np.random.default_rng(0).integers(0, 61, (6, 128)).astype(np.uint16)
    write_store(folder, tokens, chunks=(2, 64), vocab_size=61, bos_id=60)
    return f"data.train={folder}", f"data.heldout={folder}"


def test_loss_by_position_equals_its_definition(tmp_path):
    flags = (*store_flags(tmp_path / "store"), "evaluation.contextwise_length=96", "evaluation.num_documents=4")
    flags = (*flags, "evaluation.chunk_size=32", "evaluation.num_batches=1", "model.num_layers=1")
    config = resolve_implementation(tiny_config("conformal_sympow", *flags))
    data = open_run_data(config)
    model = Model(config, data.vocab_size)
    heldout = Heldout(config, model, data, lambda: False)
    store = data.heldout.stores[0]
    targets = read_documents(store, choose_documents(6, 4, seed=0), 96).astype(np.int32)
    inputs = np.concatenate([np.full((4, 1), 60, np.int32), targets[:, :-1]], axis=1)
    edges = bin_edges(24, 96, bins_per_octave=1)
    nll = jax.jit(model.nll)
    for seed in (0, 1):  # the second measurement uses the new parameters
        params = model.init(jax.random.key(seed))
        row = heldout.measure(params)
        assert row is not None
        losses = np.asarray(nll(params, inputs, targets)[0], np.float64)
        for start, stop in itertools.pairwise(edges):
            np.testing.assert_allclose(row[f"contextwise/{stop}"], losses[:, start:stop].mean(), rtol=1e-5)
    assert [name for name in row if name.startswith("contextwise/")] == [f"contextwise/{edge}" for edge in edges[1:]]
    assert Heldout(config, model, data, lambda: True).measure(params) is None  # a stop request


def heldout_rows(config, mesh=None) -> list[tuple[np.ndarray, float]]:
    """Targets, and the weight of each, of every row of every held-out batch."""
    rows = []
    for batch in open_run_data(config, mesh).heldout_batches():
        targets = np.asarray(batch["targets"])
        mask = np.asarray(batch["loss_mask"]) if "loss_mask" in batch else np.ones_like(targets)
        rows += list(zip(targets, mask, strict=True))
    return rows


@pytest.mark.parametrize(
    ("batches", "rows", "names", "read"),  # A has 30 sequences, B 10, and as many batches of 8 as needed are read
    [(2, 16, "A", 2), (3, 24, "A", 3), (4, 30, "A", 4), (9, 30, "A", 4), (9, 40, "A@3,B@1", 6), (30, 30, "A,A", 7)],
)
def test_every_heldout_row_counts_once_on_any_mesh(tmp_path, batches, rows, names, read):
    """6 documents of 5 windows; of a mixture's whose first store is read three times as fast; one store named twice."""
    for number, name in enumerate("AB"):
        tokens = (np.arange(6 * 120).reshape(6, 120) + 720 * number)[: 6 - 4 * number]
        write_store(tmp_path / name, tokens.astype(np.uint16), chunks=(2, 60), vocab_size=2000, bos_id=1999)
    spec = names.replace("A", str(tmp_path / "A")).replace("B", str(tmp_path / "B"))
    flags = (f"data.train={spec}", f"data.heldout={spec}", "data.batch_size=8", "data.seq_len=24")
    flags = (*flags, f"evaluation.num_batches={batches}", "mesh.data=1")
    for mesh_flags in (None, ("mesh.fsdp=2",), ("mesh.data=2", "mesh.fsdp=4")):
        config = tiny_config("sympow", *flags, *(mesh_flags or ()))
        source = open_run_data(config).heldout
        distinct = {tuple(targets) for step in range(batches) for targets in source[step]["targets"].tolist()}
        found = heldout_rows(config, None if mesh_flags is None else config_mesh(config))
        weights = np.array([weight.mean() for _, weight in found])
        counted = [tuple(targets.tolist()) for targets, weight in found if weight.all()]
        assert set(weights.tolist()) <= {0.0, 1.0} and len(counted) == len(set(counted)) == rows
        assert {*counted} == distinct
        assert len(found) // 8 == read


def test_the_loss_of_all_heldout_rows_is_their_mean(tmp_path):
    """More batches than rows: the same loss as with exactly as many, and the number of its targets."""
    flags = (*store_flags(tmp_path / "store"), "evaluation.contextwise_length=0", "model.num_layers=1")
    rows = []
    for size, batches in ((6, 5), (4, 9)):  # 30 windows of 24: 5 batches of 6, or 8 of 4 of which the last is half
        more = (f"data.batch_size={size}", f"evaluation.num_batches={batches}")
        config = resolve_implementation(tiny_config("conformal_sympow", *flags, *more))
        data = open_run_data(config)
        model = Model(config, data.vocab_size)
        params = model.init(jax.random.key(0))
        rows.append(Heldout(config, model, data, lambda: False).measure(params))
        if size == 6:
            parts = [data.heldout[step] for step in range(5)]
            nll = jax.jit(model.nll)
            mean = np.mean([nll(params, part["inputs"], part["targets"])[0] for part in parts], dtype=np.float64)
    assert rows[0]["heldout_loss"] == pytest.approx(mean, rel=1e-6)
    assert rows[0]["heldout_tokens"] == rows[1]["heldout_tokens"] == 30 * 24
    assert rows[1]["heldout_loss"] == pytest.approx(rows[0]["heldout_loss"], rel=1e-6)


def test_documents_must_be_long_enough(tmp_path):
    flags = (*store_flags(tmp_path / "store"), "evaluation.contextwise_length=256")
    config = resolve_implementation(tiny_config("conformal_sympow", *flags))
    data = open_run_data(config)
    with pytest.raises(ConfigError, match=r"contextwise_length = 256: .* have 128 tokens"):
        Heldout(config, Model(config, data.vocab_size), data, lambda: False)


def test_the_loss_by_position_is_of_long_documents_of_one_store(tmp_path):
    store = tmp_path / "store"
    flags = (*store_flags(store), f"data.heldout={store},{store}", "evaluation.contextwise_length=96")
    config = resolve_implementation(tiny_config("conformal_sympow", *flags))
    data = open_run_data(config)
    with pytest.raises(ConfigError, match="contextwise_length = 96: held-out documents are mixed"):
        Heldout(config, Model(config, data.vocab_size), data, lambda: False)


def test_heldout_data_are_of_the_tokenizer_of_the_training_data(tmp_path):
    flags = (*store_flags(tmp_path / "store"), "evaluation.contextwise_length=0")
    IdTokenizer(61).save(write_store(tmp_path / "ids", np.zeros((6, 128), "<u2"), chunks=(2, 64)) / "tokenizer")
    write_store(tmp_path / "more", np.zeros((6, 128), "<u2"), chunks=(2, 64), vocab_size=62, bos_id=60)
    for name, what in (("ids", "vocab_size is"), ("more", "vocab_size is 62")):
        with pytest.raises(ConfigError, match=rf"data\.heldout = .*{name}': its {what}.*of the same tokenizer"):
            open_run_data(tiny_config("conformal_sympow", *flags, f"data.heldout={tmp_path}/{name}"))


def test_a_carried_state_needs_documents_that_go_on(tmp_path):
    flags = ("evaluation.contextwise_length=0", "training.initial_state=carried", "data.order=stream")
    flags = (*store_flags(tmp_path / "store"), *flags)
    open_run_data(tiny_config("conformal_sympow", *flags, "data.seq_len=64"))
    with pytest.raises(ConfigError, match=r"initial_state = 'carried': .* have 128 tokens, and none continues"):
        open_run_data(tiny_config("conformal_sympow", *flags, "data.seq_len=65"))


def flags_of(workdir, *more: str) -> list[str]:
    own = ("num_train_steps=4", "evaluation.every_steps=2", "checkpoint.every_steps=2", "logging.every_steps=2",
           "evaluation.num_batches=1", "logging.peak_flops=1e9", "data.batch_size=8")  # fmt: skip
    flags = [f"--config.{flag}" for flag in (*TINY, *own, *more)]
    return ["--config=configs/quickstart.py:conformal_sympow", f"--workdir={workdir}", *flags]


def evaluate(flags: list[str]) -> int:
    return one_line_errors(eval_command.run, flags)


def train(flags: list[str]) -> int:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        return one_line_errors(train_command.run, flags)


@pytest.mark.slow
def test_chosen_steps_have_the_loss_by_position(tmp_path):
    more = (*store_flags(tmp_path / "store"), "evaluation.contextwise_length=96", "evaluation.num_documents=4")
    assert train(flags_of(tmp_path / "run", *more)) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all({"contextwise/24", "contextwise/96"} <= set(row) for row in rows)
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_stop_in_an_evaluation_leaves_a_step_that_is_evaluated_once_and_counts(tmp_path, monkeypatch):
    flags, whole = flags_of(tmp_path / "run", *store_flags(tmp_path / "store"), "num_train_steps=2"), Heldout.measure

    def stopped(self, params):
        monkeypatch.setattr(Heldout, "measure", whole)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Heldout, "measure", stopped)
    assert train(flags) == 143
    for _ in range(2):  # the second says that it is finished
        assert train(flags) == 0
    (row,) = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "heldout_loss" in row)
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "2")
    assert manifest["metrics"] == {"heldout_loss": row["heldout_loss"]} and manifest["metadata"]["evaluated_step"] == 2


@pytest.mark.slow
def test_a_run_that_is_given_fewer_steps_than_it_has_is_evaluated_and_finished(tmp_path, capsys):
    run = tmp_path / "run"
    flags = flags_of(run, *store_flags(tmp_path / "store"), "evaluation.every_steps=0", "checkpoint.keep_last=2")
    assert train(flags) == 0
    shutil.rmtree(run / "checkpoints" / "4")  # as if it had been stopped at step 2
    flags = [*flags, "--config.num_train_steps=1"]
    assert train(flags) == 0
    said = capsys.readouterr().out
    assert "0 steps logged since then are done again" in said and "\n0 steps in" in said
    assert (
        read_metrics(run / "metrics.jsonl")[-1]["step"] == 2 and "heldout_loss" in (run / "metrics.jsonl").read_text()
    )
    assert train(flags) == 0 and "is finished: 2 of 1 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_is_trained_and_evaluated_by_command(tmp_path, capsys):
    """train.py on MQAR logs accuracy; eval.py writes grids for it and for the tasks that text models are asked."""
    run = tmp_path / "mqar"
    task = ("data.train=mqar", "data.heldout=mqar", "task.vocab_size=64", "task.num_pairs=2", "data.order=rectangle")
    assert train(flags_of(run, *task)) == 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "heldout_accuracy" in row]
    assert len(rows) == 2 and 0 <= rows[-1]["heldout_accuracy"] <= 1
    assert evaluate([f"--workdir={run}", "--lengths=24,48", "--pairs=2,4,12", "--num_examples=4"]) == 0
    assert evaluate([f"--workdir={run}", "--task=selective_copy", "--lengths=24", "--num_examples=4"]) == 0
    assert evaluate([f"--workdir={run}", "--task=copy", "--lengths=24,48", "--num_examples=4", "--name=c"]) == 0
    names = {f"{name}.{kind}" for name in ("mqar", "selective_copy", "c") for kind in ("json", "npz", "png")}
    assert {path.name for path in (run / "eval").glob("[!.]*")} == names
    for flags, message in (
        ([], "exceed"),
        (["--task=mqra"], "did you mean 'mqar'"),
        (["--depths=0.5"], "--depths: does not belong to --task=mqar"),
        (["--task=length_generalisation"], "needs text"),
        (["--task=needle", "--lengths=96"], "needle needs text"),
    ):
        lengths = [] if "--lengths=96" in flags else ["--lengths=96"]
        assert evaluate([f"--workdir={run}", *lengths, *flags]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_text_models_are_asked_for_passkeys_needles_and_what_they_remember(tmp_path):
    run = tmp_path / "text"
    assert train(flags_of(run)) == 0
    assert evaluate([f"--workdir={run}", "--remembrance", "--lengths=24,100", "--num_documents=3"]) == 0
    assert read_result(run / "eval" / "remembrance.json")["length"] == 100
    assert {path.suffix for path in (run / "eval").glob("remembrance.*")} == {".json", ".npz", ".csv", ".png"}
    for task in ("passkey", "needle"):
        flags = [f"--workdir={run}", f"--task={task}", "--lengths=400", "--depths=0,1", "--num_examples=2"]
        assert evaluate(flags) == 0
        assert (run / "eval" / f"{task}.json").is_file() and (run / "eval" / f"{task}.png").is_file()
