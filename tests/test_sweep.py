"""Sweeps: which runs there are, what a killed one leaves to do, and the table."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import pytest

from sympow_jax import sweep
from sympow_jax.config import ConfigError, parse_flags, parse_points, parse_variants
from sympow_jax.evaluation_request import inputs
from sympow_jax.files import FileError, write_json_atomic
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.plots.sweep_tables import recall_points, recall_table, runs_table, variants_table
from sympow_jax.training.run_files import load_config, resolve_for
from sympow_jax.variants import VARIANTS
from tests.input_pipeline.stores import random_tokens, write_store
from tests.models.small import ROOT, tiny_config


def result_of(variant, seed, lengths):
    rows = [{"context": length, "nll": 2.0 + length / 1000, "ci95": [2.0, 3.0]} for length in lengths]
    return {
        "step": 800, "variant": variant, "seed": seed, "train_length": 512, "same_target": rows, "num_targets": 8,
        "lengths": [{"length": row["context"], "nll": row["nll"], "ci95": [2.0, 3.0]} for row in rows],
        "same_target_change": {
            "context": lengths, "from_context": lengths[0],
            "difference": [0.0] * len(rows), "ci95": [[0.0, 0.0]] * len(rows),
        },
        "contextwise": {"position": [200.0, 900.0], "nll": [3.0, 2.0], "ci95": [[2.0, 3.0]] * 2},
        "data": {"store": "toy", "digest": "toy", "bos_rule": "first"}, "num_documents": 2,
        "num_sources": 2, "dtype": "float32", "position_overrides": {},
    }  # fmt: skip


def write_checkpoint(workdir, step, parameters="a"):
    """The manifest of a checkpoint, which is all that a sweep reads of it."""
    arrays = {"params/x": {"shape": [1], "dtype": "float32", "digest": parameters}}
    manifest = {"format": 1, "step": step, "metadata": {}, "metrics": {}, "arrays": arrays}
    text = json.dumps(manifest, sort_keys=True)
    folder = workdir / "checkpoints" / str(step) / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata").write_text(json.dumps(manifest | {"digest": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.fixture
def done(monkeypatch):
    """Training and evaluation that write their files at once: what was done so far; None among it is a kill."""
    done = []

    def train(config, workdir, **initial):
        if None in done:
            raise KeyboardInterrupt
        workdir = pathlib.Path(workdir)
        tree = dataclasses.asdict(resolve_for(config, str(workdir)))
        if not workdir.exists():
            done.append(f"train {workdir.name}")
            workdir.mkdir(parents=True)
            ByteTokenizer().save(workdir / "tokenizer")
            write_checkpoint(workdir, config.num_train_steps)
            row = {"step": config.num_train_steps, "heldout_loss": abs(config.optimizer.learning_rate - 2e-3)}
            (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        write_json_atomic(workdir / "config.json", tree)
        return 0

    def evaluate(request):
        folder = pathlib.Path(request.workdir)
        done.append(f"evaluate {folder.name}")
        variant, _, seed = folder.name.rpartition("-seed")
        variant = variant.partition("-lr")[0]
        (folder / "eval").mkdir(exist_ok=True)
        digest = open_data(request.data, "heldout", seq_len=512).digest
        made_from = inputs(request, load_config(str(folder)), request.step, digest)
        result = result_of(variant, int(seed), list(request.lengths)) | {"inputs": made_from}
        write_json_atomic(folder / "eval" / f"{request.name}.json", result)

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "evaluate", evaluate)
    monkeypatch.setattr(sweep, "use_compilation_cache", lambda: None)
    return done


@pytest.fixture
def command(tmp_path, rng):
    """A sweep of one run over a small store."""
    store = write_store(tmp_path / "a.zarr", random_tokens(rng, (4, 1024)), chunks=(4, 1024))
    return [
        f"--config={ROOT}/configs/quickstart.py", "--variants=softmax_rope", f"--root={tmp_path}/root",
        "--lengths=512,1024", f"--config.data.heldout={store}",
    ]  # fmt: skip


def test_a_stopped_sweep_goes_on_where_it_stopped(command, tmp_path, done):
    command[1] = "--variants=softmax_rope:0+1,sympow"
    root = tmp_path / "root"
    done.append(None)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(command)
    assert done == [None] and not (root / "sweep.json").exists()
    done.remove(None)
    assert sweep.run([command[0], "--variants=softmax_rope:0+1", *command[2:]]) == 0
    assert len(json.loads((root / "sweep.json").read_text())) == 2
    assert sweep.run(command) == 0
    names = ["softmax_rope-seed0", "softmax_rope-seed1", "sympow-seed0"]
    assert done == [f"{act} {name}" for name in names for act in ("train", "evaluate")]
    table = (root / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 2 + 1 + 2 + 3 and table[-1].startswith("| sympow | 0 | 2.512 | 3.024 |")
    assert table[2].startswith("| softmax_rope | 2 | - | 2.512 | 3.024 |")
    assert (root / "sweep.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: differs from the run in"):
        sweep.run([*command, "--config.optimizer.learning_rate=1"])


def test_tables_are_of_all_runs_that_are_evaluated_whatever_sweep_made_them(command, tmp_path, done):
    root, rates = tmp_path / "root", "--learning_rates=1e-3,2e-3"
    with pytest.raises(ConfigError, match=r"^--tables: no run of this sweep in --root = \S+ is evaluated"):
        sweep.run([*command, rates, "--tables"])
    for share in ("fox:3", "sympow"):  # the last one writes over the tables of the first
        assert sweep.run([command[0], f"--variants={share}", *command[2:], rates]) == 0
    done.clear()
    command[1] = "--variants=fox:3+4,softmax_rope,sympow"
    assert sweep.run([*command, rates, "--tables"]) == 0 and done == []
    rows = json.loads((root / "sweep.json").read_text())
    assert [(row["variant"], row["learning_rate"]) for row in rows] == [("fox", 2e-3), ("sympow", 2e-3)]
    for change in ("--lengths=512", "--config.num_train_steps=900"):
        with pytest.raises(ConfigError, match="no run of this sweep"):
            sweep.run([*command, rates, "--tables", change])


def test_a_foreign_result_is_one_error_and_a_loss_that_is_not_finite_a_dash(tmp_path):
    file = tmp_path / "run" / "eval" / "length_generalisation.json"
    file.parent.mkdir(parents=True)
    result = result_of("sympow", 0, [512, 1024])
    run = sweep.Run("sympow", parse_flags([f"--config={ROOT}/configs/quickstart.py:sympow"]), tmp_path / "run")
    for key, value in (("same_target", None), ("variant", "[/a|b]"), ("seed", "x"), ("lengths", [])):
        write_json_atomic(file, result | {key: value})
        with pytest.raises(FileError, match=rf"length_generalisation\.json: {key}.* is not .*; evaluate again"):
            sweep.write_summary(tmp_path, [run])
    write_json_atomic(file, {"a": 1})
    with pytest.raises(FileError, match="is not there; evaluate again"):
        sweep.write_summary(tmp_path, [run])
    result["same_target"][1] |= {"nll": None, "ci95": [None, None]}
    change = {"difference": [0.0, None], "ci95": [[0.0, 0.0], [None, None]]}
    table = runs_table([result | {"same_target_change": result["same_target_change"] | change}])
    assert table.splitlines()[-1] == "| sympow | 0 | 2.512 | - | - [-, -] | 2.512 |"


def test_the_rate_with_the_lowest_heldout_loss_is_that_of_all_seeds_and_is_chosen_once(command, tmp_path, done):
    command[1] = "--variants=sympow:3+4"
    command.append("--learning_rates=1e-3,2e-3,4e-3")
    assert sweep.run(command) == 0 == sweep.run(command)
    assert done == [
        "train sympow-lr0.001-seed3",
        "train sympow-lr0.002-seed3",
        "train sympow-lr0.004-seed3",
        "evaluate sympow-lr0.002-seed3",
        "train sympow-lr0.002-seed4",
        "evaluate sympow-lr0.002-seed4",
    ]
    chosen = json.loads((tmp_path / "root" / "learning_rates.json").read_text())["sympow"]
    assert chosen["chosen"] == 2e-3 and chosen["heldout_loss"] == {"0.001": 1e-3, "0.002": 0.0, "0.004": 2e-3}
    assert load_config(str(tmp_path / "root" / "sympow-lr0.002-seed4")).optimizer.learning_rate == 2e-3
    assert "| sympow | 2 | 0.002 | 2.512 |" in (tmp_path / "root" / "sweep.md").read_text()


def test_a_rate_that_diverges_is_not_chosen_and_the_others_are_tried(command, tmp_path, done, monkeypatch):
    plain = sweep.train

    def train(config, workdir, **initial):
        if config.optimizer.learning_rate in diverging:
            raise sweep.BadStepsError("10 steps in a row")
        return plain(config, workdir, **initial)

    monkeypatch.setattr(sweep, "train", train)
    command.append("--learning_rates=2e-3,4e-3")
    diverging = (2e-3, 4e-3)
    with pytest.raises(
        ConfigError, match=r"--learning_rates = 0\.002, 0\.004: softmax_rope has no finite held-out loss"
    ):
        sweep.run(command)
    diverging = (2e-3,)
    assert sweep.run(command) == 0
    chosen = json.loads((tmp_path / "root" / "learning_rates.json").read_text())["softmax_rope"]
    assert chosen["chosen"] == 4e-3 and chosen["heldout_loss"] == {"0.002": None, "0.004": 2e-3}


def test_finished_runs_are_not_those_of_other_initial_weights(command, done):
    assert sweep.run(command) == 0
    with pytest.raises(ConfigError, match=r"--init_from=other: the run in \S+ started from scratch"):
        sweep.run([*command, "--init_from=other"])


def test_points_of_other_contexts_do_not_share_a_table(command, tmp_path, done):
    file = tmp_path / "points.py"
    file.write_text(
        "from configs import quickstart\nPOINTS = ('128', '256')\n"
        "def get_config(point):\n    c = quickstart.get_config('fox')\n    c.data.seq_len = int(point)\n    return c\n"
    )
    with pytest.raises(ConfigError, match=r"--points: '256' is trained at 256 .*'128' at 128 .*sweep them apart"):
        sweep.run([f"--config={file}", "--points=all", *command[2:]])
    assert done == []


def test_the_runs_of_a_sweep_have_the_devices_that_the_flag_names(command, done, monkeypatch):
    with pytest.raises(ConfigError, match=r"^mesh.cpu_devices = 3: \w+ names a number too"):  # the tests' environment
        sweep.run([*command, "--config.mesh.cpu_devices=3"])
    assert done == []
    chosen = []
    monkeypatch.setattr(sweep, "use_cpu_devices", lambda config: chosen.append(config.mesh.cpu_devices))
    auto, two = (tiny_config("softmax_nope", f"mesh.cpu_devices={n}") for n in (-1, 2))
    sweep.use_devices_of_all([auto, auto])
    sweep.use_devices_of_all([two, two])
    assert chosen == [2]
    with pytest.raises(ConfigError, match=r"^mesh.cpu_devices = -1 and 2: the runs of a sweep share one process"):
        sweep.use_devices_of_all([two, auto])


def test_a_task_is_asked_at_its_own_length():
    for lengths, asked in (("", (64,)), ("32,64", (32, 64))):
        flags = ["--config.data.train=mqar", "--config.data.heldout=mqar", "--config.data.seq_len=64"]
        config = parse_flags([f"--config={ROOT}/configs/quickstart.py:fox", *flags])
        own = {"lengths": lengths} if lengths else {}
        assert sweep._lengths(own, sweep.Run("fox", config, pathlib.Path())) == asked


def test_a_variant_that_is_not_within_five_percent_of_the_best_is_marked():
    results = [result_of("sympow", 0, [512, 1024]), result_of("fox", 0, [512, 1024])]
    for loss, text in ((2.512 * 1.04, "| 2.612 |"), (2.512 * 1.06, "| 2.663, 6% above the best |")):
        results[1]["lengths"][0]["nll"] = loss
        assert variants_table(results).splitlines()[-1].endswith(text)


def test_accuracies_of_a_size_of_state_are_one_point():
    grid = {"columns": {"values": [64, 32]}, "train_length": 32, "state_bytes": 1234, "learning_rate": 0.01}
    grid |= {"name": "based,feature_dim=4", "rates_tried": [0.001, 0.01]}
    results = [grid | {"seed": seed, "accuracy": [[0.9, 0.1 * seed]]} for seed in range(3)]
    (point,) = recall_points(results)
    assert point["mean"] == pytest.approx(0.1) and point["family"] == "based"
    assert "| 1,234 | 10.0% [0.0%, 34.8%] | 0.0%, 10.0%, 20.0% | 0.01 (highest) |" in recall_table(results)


def test_the_accuracy_of_a_task_with_depths_is_that_of_all_depths():
    grid = {"columns": {"values": [32, 64]}, "train_length": 64, "state_bytes": 1, "name": "fox", "seed": 0}
    (point,) = recall_points([grid | {"accuracy": [[1.0, 0.0], [1.0, 0.5], [1.0, 1.0]]}])
    assert point["mean"] == 0.5
    (point,) = recall_points([grid | {"accuracy": [[1.0, None], [1.0, 0.5]]}])
    assert point["mean"] is None


def test_points_are_those_of_the_config_file():
    path = f"{ROOT}/configs/figures/state_recall.py"
    assert len(parse_points("all", (0, 1, 2), [path])) == 3 * 30
    assert parse_points("based,feature_dim=4", (5,), [path]) == [("based,feature_dim=4", 5)]
    with pytest.raises(ConfigError, match="no point 'based,feature_dim=5'; did you mean"):
        parse_points("based,feature_dim=5", (0,), [path])
    with pytest.raises(ConfigError, match="has no tuple POINTS"):
        parse_points("all", (0,), [f"{ROOT}/configs/quickstart.py"])


def test_points_of_one_variant_are_rows_of_their_own(command, tmp_path, done):
    command[:2] = [f"--config={ROOT}/configs/figures/state_passing.py", "--points=sympow,zero;sympow,noise"]
    assert sweep.run(command) == 0
    table = (tmp_path / "root" / "sweep.md").read_text()
    assert "| sympow,zero | 1 | - | 2.512 |" in table and "| sympow,noise | 0 | 2.512 |" in table


@pytest.mark.slow
def test_a_result_is_used_again_only_for_what_it_was_made_from(command, tmp_path, rng, done):
    run = tmp_path / "root" / "softmax_rope-seed0"
    assert sweep.run(command) == 0

    def evaluated_again(*changes):
        done.clear()
        assert sweep.run([*command, *changes]) == 0
        return done == ["evaluate softmax_rope-seed0"]

    assert not evaluated_again() and done == []
    assert not evaluated_again("--config.logging.every_steps=7", "--config.model.remat=block")
    for change in (
        "--config.evaluation.num_documents=3",
        "--config.evaluation.chunk_size=64",
        "--lengths=256,1024",
    ):
        assert evaluated_again(change), change
        assert not evaluated_again(change), change
    assert evaluated_again()
    for left in ("a.zarr", "a.ledger"):
        shutil.rmtree(tmp_path / left)  # other documents at the same place
    write_store(tmp_path / "a.zarr", random_tokens(rng, (4, 1024)), chunks=(4, 1024))
    assert evaluated_again() and not evaluated_again()
    write_checkpoint(run, 800, parameters="b")  # trained anew: the same step, other parameters
    assert evaluated_again() and not evaluated_again()
    result = json.loads((run / "eval" / "length_generalisation.json").read_text())
    del result["inputs"]["settings"]["position.rotation"]  # a file of before the key, which means what it did then
    write_json_atomic(run / "eval" / "length_generalisation.json", result)
    assert not evaluated_again()
    result = json.loads((run / "eval" / "length_generalisation.json").read_text())
    del result["inputs"]  # a file that says nothing of its inputs
    write_json_atomic(run / "eval" / "length_generalisation.json", result)
    assert evaluated_again()


def test_a_run_that_stops_is_not_evaluated_and_its_code_is_the_sweeps(command, done, monkeypatch):
    monkeypatch.setattr(sweep, "train", lambda config, workdir, **initial: 130)
    assert sweep.run(command) == 130 and done == []


def test_variants_are_named_with_their_seeds():
    runs = parse_variants("fox:3+4,sympow", (0, 1))
    assert runs == [("fox", 3), ("fox", 4), ("sympow", 0), ("sympow", 1)]
    assert len(parse_variants("all,fox:0+1", (0,))) == len(VARIANTS) + 1
    with pytest.raises(ConfigError, match="no variant 'foxx'; did you mean 'fox'"):
        parse_variants("foxx", (0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fox,sympow,fox", "fox,sympow,fox: fox is there twice; its seeds go as fox:0+1"),
        ("fox:0,fox:1", "fox is there twice"),
        ("fox:0+0", "seeds of fox = 0,0: 0 is there twice"),
        ("fox:-1", "seeds of fox = -1: must be at least 0"),
        ("fox:+", "seeds of fox = .*: empty"),
    ],
)
def test_a_run_is_named_once(text, message):
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        parse_variants(text, (0,))
