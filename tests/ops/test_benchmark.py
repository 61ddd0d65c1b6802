"""The counts of the benchmark of operations."""

import os
import signal
import sys

import pytest

from benchmarks import all as every
from benchmarks import ops as benchmark
from benchmarks import probe, study
from configs.figures import state_passing
from sympow_jax.variants import VARIANTS


def test_useful_flops_are_those_of_exact_sizes():
    linear = benchmark.useful_flops(benchmark.parse("p2,1,16384,4,64:chunked"))
    assert linear["forward"] == 4 * 2080 * 65 * 4 * 16384
    assert linear["forward+backward"] == 3 * linear["forward"]
    quartic = benchmark.useful_flops(benchmark.parse("p4,1,1,1,16:chunked"))
    assert quartic["forward"] == 4 * 3876 * 17
    softmax = benchmark.useful_flops(benchmark.parse("softmax,1,1024,4,64"))
    assert softmax["forward"] == 4 * 2 * (2 * 64) * 1024**2 / 2


def test_gated_and_biased_softmax_is_a_table_of_ratios_to_plain_softmax(monkeypatch):
    def interleaved(cases, *, seconds):
        return {name: {"median": 1.0, "cpu_median": 1.0 if "plain" in name else 1.5} for name in cases}

    monkeypatch.setattr(probe, "interleaved", interleaved)
    row = benchmark.measure(benchmark.parse("fox,1,64,1,8:blockwise"), "float32", 0.0)
    assert "| 64, forward | 1.50 |\n| 64, forward + backward | 1.50 |" in benchmark.over_softmax_table([row])


def test_the_tables_of_results_are_those_that_benchmarks_all_wrote(tmp_path, monkeypatch):
    text = every.RESULTS.read_text()
    assert all(f"<!-- benchmarks.all: {name} -->\n" in text for name in every.PARTS)
    assert every.with_tables(text) == text
    monkeypatch.setattr(every, "FOLDER", tmp_path)
    kept = {"command": "python -m X", "commit": "c0ffee1", "machine": "2 cores", "load": [0.1, 2.0]}
    for machine, seconds in (("2 cores", 1.5), ("4 cores", 6.0), ("2 cores", 7.891)):
        every.keep("start", kept | {"machine": machine, "rows": [{"start": "cold", "median": seconds}]})
    filled = every.with_tables(text)
    assert "\n4 cores, load" in filled and "| first step, cold | 6.00 |" in filled and "1.50 |" not in filled
    assert "    python -m X\n\n2 cores, load 0.1 before and 2.0 after, commit c0ffee1:\n" in filled
    assert "| first step, cold | 7.89 |" in filled and every.with_tables(filled) == filled


def test_the_studies_of_results_are_written_where_their_marks_are():
    text = every.RESULTS.read_text()
    kept = {"command": "python -m X", "sweep": "python -m Y", "machine": "2 cores", "runs": 7, "table": "| a |\n"}
    kept |= {"calls": [{"commit": "c0ffee1"}, {"commit": "c0ffee2"}, {"commit": "c0ffee1"}], "digests": ["sha256:1"]}
    for name in study.SWEEPS:
        filled = study.with_section(text, name, kept)
        assert "7 runs, 2 cores, commit c0ffee1, c0ffee2, held-out digest `sha256:1`:\n\n| a |\n" in filled
        assert f"![{name}](docs/{name}.png)" in filled and study.with_section(filled, name, kept) == filled


def test_the_points_or_variants_of_a_study_are_dealt_out_to_the_cores():
    for name, separator, everything in (("state_passing", ";", state_passing.POINTS), ("length_study", ",", VARIANTS)):
        for count in (1, 3):
            dealt = [share.split(separator) for share in study.shares(name, count)]
            assert len(dealt) == count and max(map(len, dealt)) - min(map(len, dealt)) <= 1
            assert sorted(name for share in dealt for name in share) == sorted(everything)
    command = study.sweep_command("state_passing", "runs/x", "sympow,zero;based,noise")
    assert command.endswith("--root=runs/x --points=sympow,zero;based,noise --seeds=0,1,2")


def test_a_part_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all", "--only=start,decod"])
    monkeypatch.setattr(every, "measure", None)
    with pytest.raises(SystemExit):
        every.main()
    assert "--only: there is no part 'decod'; give some of train_step" in capsys.readouterr().err


class Sweep:
    """A sweep that runs until a signal comes, which comes to the study as it waits; or one that is done."""

    def __init__(self, runs):
        self.runs, self.came = runs, []

    def send_signal(self, number):
        self.came.append(number)

    def wait(self):
        if self.runs:
            os.kill(os.getpid(), signal.SIGTERM)
        return -self.came[-1] if self.runs else 0


def test_a_study_passes_a_signal_on_to_its_sweeps_and_ends_with_the_code_of_one_that_failed():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert study.wait([Sweep(runs=True), Sweep(runs=False)]) == 128 + signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_the_tables_of_a_study_are_written_anew_also_where_a_sweep_failed(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(study, "measure", lambda name, root: called.append("measure") or 3)
    monkeypatch.setattr(study, "tables", lambda name, root: called.append("tables") or 0)
    for flags, codes in ((["--tables"], (0, ["tables"])), ([], (3, ["measure", "tables"]))):
        monkeypatch.setattr(sys, "argv", ["study", "state_passing", f"--root={tmp_path}", *flags])
        with pytest.raises(SystemExit) as stopped:
            study.main()
        assert (stopped.value.code, called) == codes
        called.clear()


def test_the_runs_of_a_study_move_to_another_machine_without_their_arrays(tmp_path):
    root, again = tmp_path / "root", tmp_path / "again"
    kept = ["learning_rates.json", "a-seed0/config.json", "a-seed0/.lock", "a-seed0/eval/mqar.json"]
    kept += [f"a-seed0/checkpoints/800/{name}" for name in ("_CHECKPOINT_METADATA", "manifest/metadata")]
    others = ["sweep.png", "a-seed0/eval/mqar.npz", "a-seed0/tensorboard/x"]
    others += [f"a-seed0/checkpoints/800/{name}" for name in ("commit_success.txt", "state/d/x")]
    for name in [*kept, *others, "b-seed0/config.json", "b-seed0/checkpoints/200/manifest/metadata"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    study.pack(root, tmp_path / "runs.tar.xz")
    study.unpack(tmp_path / "runs.tar.xz", again)
    found = {str(path.relative_to(again)): path.read_text() for path in again.rglob("*") if path.is_file()}
    assert found == {name: name for name in kept}, "a run that is not evaluated would go on from nothing"
