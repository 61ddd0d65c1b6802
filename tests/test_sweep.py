"""Sweeps: which runs there are, what a killed one leaves to do, and the table."""

import dataclasses
import json
import pathlib

import pytest

from sympow_jax import sweep
from sympow_jax.config import ConfigError, parse_variants
from sympow_jax.files import write_json_atomic
from sympow_jax.training.run_files import resolve_for
from sympow_jax.variants import VARIANTS
from tests.models.small import ROOT


def result_of(variant, seed, lengths):
    rows = [{"context": length, "nll": 2.0 + length / 1000, "ci95": [2.0, 3.0]} for length in lengths]
    return {
        "step": 800, "variant": variant, "seed": seed, "train_length": 512, "same_target": rows, "num_targets": 8,
        "lengths": [{"length": row["context"], "nll": row["nll"], "ci95": [2.0, 3.0]} for row in rows],
        "same_target_change": {"difference": [0.0] * len(rows), "ci95": [[0.0, 0.0]] * len(rows)},
        "contextwise": {"position": [200.0, 900.0], "nll": [3.0, 2.0], "ci95": [[2.0, 3.0]] * 2},
        "data": {"store": "toy", "digest": "toy"}, "num_documents": 2, "dtype": "float32", "position_overrides": {},
    }  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Training and evaluation that write their files at once: the workdirs trained so far; None among them: a kill."""
    trained = []

    def train(config, workdir):
        if None in trained:
            raise KeyboardInterrupt
        trained.append(pathlib.Path(workdir).name)
        tree = dataclasses.asdict(resolve_for(config, workdir))
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json_atomic(pathlib.Path(workdir) / "config.json", tree)
        return 0

    def evaluate(request):
        folder = pathlib.Path(request.workdir)
        variant, _, seed = folder.name.rpartition("-seed")
        (folder / "eval").mkdir()
        result = result_of(variant, int(seed), list(request.lengths))
        write_json_atomic(folder / "eval" / f"{request.name}.json", result)

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "evaluate", evaluate)
    monkeypatch.setattr(sweep, "use_compilation_cache", lambda: None)
    return trained


def test_a_stopped_sweep_goes_on_where_it_stopped(tmp_path, trained):
    command = [
        f"--config={ROOT}/configs/quickstart.py", "--variants=softmax_rope:0+1,sympow", f"--root={tmp_path}",
        "--lengths=512,1024",
    ]  # fmt: skip
    trained.append(None)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(command)
    assert trained == [None] and not (tmp_path / "sweep.json").exists()
    trained.remove(None)
    assert sweep.run([command[0], "--variants=softmax_rope:0+1", *command[2:]]) == 0
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 2
    assert sweep.run(command) == 0
    assert trained == ["softmax_rope-seed0", "softmax_rope-seed1", "sympow-seed0"]
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 3 and table[-1].startswith("| sympow | 0 | 2.512 | 3.024 |")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: differs from the run in"):
        sweep.run([*command, "--config.optimizer.learning_rate=1"])


def test_variants_are_named_with_their_seeds():
    runs = parse_variants("fox:3+4,sympow", (0, 1))
    assert runs == [("fox", 3), ("fox", 4), ("sympow", 0), ("sympow", 1)]
    assert len(parse_variants("all,fox:0+1", (0,))) == len(VARIANTS) + 1
    with pytest.raises(ConfigError, match="no variant 'foxx'; did you mean 'fox'"):
        parse_variants("foxx", (0,))
