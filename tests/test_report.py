import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from sympow_jax import config as config_lib
from sympow_jax import report
from sympow_jax.command_line import one_line_errors
from sympow_jax.evals.files import inputs_digest, write_json, write_result
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.evals.result_shape import read_result
from sympow_jax.files import FileError
from sympow_jax.models.model import resolve_implementation
from sympow_jax.plots import panels
from sympow_jax.plots.report import report_page
from tests.evals.toy import Bigram, make_store
from tests.plots.results import remembrance_result

LAYER = {"layer": 0, "log_weight": [[0.0, -1.0]]}


def make_run(folder, variant, *, scale=1.0, seed=0, evaluated=True, store=None):
    """A workdir with real evaluation files, of a scoring model whose losses are `scale` times those of another."""
    flags = [f"--config=configs/quickstart.py:{variant}", f"--config.seed={seed}", "--config.data.seq_len=64"]
    config = resolve_implementation(config_lib.parse_flags(flags))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "data.json", {"vocab_size": 257})
    rows = [{"step": 10 * i, "loss": 5 * 0.9**i, "tokens": 1000 * i} for i in range(1, 40)]
    rows.append({"step": 390, "heldout_loss": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluated:
        params = scale * np.random.default_rng(0).random((8, 8)).astype(np.float32)
        run = {"step": 390, "variant": variant, "seed": seed, "dtype": "float32"}
        options = dict(lengths=[64, 128, 256], train_length=64, num_documents=8, run=run)
        result, arrays = length_generalisation(Bigram(), params, store or make_store(length=256), **options)
        write_result(folder / "eval", "length_generalisation", result, arrays)
    return str(folder)


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and the text of cells, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_over_several_runs(tmp_path):
    runs = [
        make_run(tmp_path / "a", "conformal_sympow"),
        make_run(tmp_path / "b", "softmax_rope", scale=1.1),
        make_run(tmp_path / "c", "sympow", evaluated=False),
    ]
    grid = {
        "task": "mqar", "columns": {"name": "length (tokens)", "values": [64, 128]}, "num_examples": 9,
        "rows": {"name": "pairs", "values": [8]}, "accuracy": [[0.9, None]], "train_length": 64,
    }  # fmt: skip
    write_json(tmp_path / "a" / "eval" / "mqar.json", grid)
    layers = [{"layer": 0, "log_weight": [[0.0, -0.1, -30.0], [0.0, -0.2, -1.0]]}]
    curves = {"variant": "conformal_sympow", "query_position": 255, "distance": [0, 1, 255], "layers": layers}
    write_json(tmp_path / "a" / "eval" / "position_bias.json", curves)
    for name, variant, layers in (("a", "conformal_sympow", (0, 1)), ("b", "softmax_rope", ())):
        write_json(tmp_path / name / "eval" / "remembrance.json", remembrance_result(variant, layers))
    output = tmp_path / "report.html"
    assert report.run([*runs, f"--output={output}"]) == 0
    page = Page(output.read_text())
    text = " ".join(page.text)
    for expected in (
        "conformal_sympow",
        "sympow (not evaluated)",
        "Paired differences",
        "minus conformal_sympow",
        "Biases and gates",
        "Remembrance and states",
        "conformal_sympow: state (solid), normaliser (dashed)",
        "softmax_rope: the last 256 of 4,096",
    ):
        assert expected in text
    assert "attention.kernel" in text and "logging.every_steps" not in text  # differing settings only
    assert "Published curves" not in text  # no LongCrawl64 run
    assert page.tags.count("figure") == 2 + 1 + 3 + 1 + 2 + 1 + 1
    assert all(address.startswith(("#", "data:image/png")) for address in page.addresses)
    assert page.tags.count("script") == 1 and "link" not in page.tags and "@import" not in output.read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders_and_evaluations():
    same = [{"variant": "fox", "seed": 0}] * 2
    assert report._distinct(same, [("x/a", "e"), ("x/b", "e")]) == ["fox [a]", "fox [b]"]
    assert report._distinct(same, [("x/a", "e"), ("y/a/", "e")]) == ["fox [x/a]", "fox [y/a]"]
    assert report._distinct(same, [("x/a", "e"), ("x/a", "long")]) == ["fox [a, e]", "fox [a, long]"]


def test_a_difference_of_early_positions_alone_has_no_panel():
    early = {"position": [2.0, 4.0], "difference": [0.0, 0.0], "ci95": [[0.0, 0.0]] * 2}
    assert not panels.has_positions({"contextwise": early}) and not panels.has_positions({"contextwise": {}})
    assert panels.has_positions({"contextwise": early | {"position": [2.0, 40.0]}})


def test_a_grid_is_as_large_as_its_axes_say(tmp_path):
    grid = {"task": "copy", "num_examples": 1, "train_length": 8, "accuracy": [[1.0, 0.5]]}
    grid |= {"columns": {"name": "length", "values": [8, 16]}, "rows": {"name": "all", "values": ["all"]}}
    write_json(tmp_path / "copy.json", grid)
    assert read_result(tmp_path / "copy.json")["accuracy"] == [[1.0, 0.5]]
    for accuracy in ([[1.0]], [[1.0, 0.5], [1.0, 0.5]]):
        write_json(tmp_path / "copy.json", grid | {"accuracy": accuracy})
        with pytest.raises(FileError, match=r"copy\.json: accuracy is not of .*; evaluate again"):
            read_result(tmp_path / "copy.json")


def test_a_run_with_another_evaluation_alone_is_not_called_unevaluated(tmp_path):
    runs = [make_run(tmp_path / name, variant, evaluated=False) for name, variant in (("a", "sympow"), ("b", "based"))]
    write_json(tmp_path / "a" / "eval" / "remembrance.json", remembrance_result("sympow", (0,)))
    text = " ".join(Page(report_page(report.gather(runs))).text)
    assert "based (not evaluated)" in text and "sympow (not evaluated)" not in text


def test_seeds_are_one_row_and_every_run_has_a_page(tmp_path):
    runs = [make_run(tmp_path / "a", "sympow")]
    runs += [make_run(tmp_path / f"b{seed}", "fox", scale=1.1 + 0.1 * seed, seed=seed) for seed in range(3)]
    data = report.gather(runs)
    assert [(group["label"], group["members"]) for group in data["groups"]] == [
        ("sympow", [0]),
        ("fox (3 seeds)", [1, 2, 3]),
    ]
    first = data["groups"][0]["result"]["same_target"]
    for row, own in zip(data["paired"][0]["result"]["same_target"], first, strict=True):
        np.testing.assert_allclose(row["difference"], 0.2 * own["nll"], rtol=1e-4)
    output = tmp_path / "folder" / "report.html"
    assert report.run([*runs, f"--output={output}", "--pages"]) == 0
    links = [address for address in Page(output.read_text()).addresses if address.endswith(".html")]
    assert links[3] == "report-runs/4-fox-seed-2.html" and len(links) == 4
    text = (output.parent / links[3]).read_text()
    assert "fox (seed 2)" in text and "optimizer.learning_rate" in text and "fox (seed 1)" not in text


def test_a_line_that_is_no_row_is_left_out_and_named_and_a_row_without_numbers_refused(tmp_path, caplog, capsys):
    run = make_run(tmp_path / "a", "sympow", evaluated=False)
    metrics = tmp_path / "a" / "metrics.jsonl"
    whole = metrics.read_bytes()
    losses = report.gather([run])["runs"][0]["training"]["loss"]
    for damage in (
        b'{"st\n',
        b'{"step": 15, "loss": 4.\n',
        b"rubbish\n",
        b'{"step": "ten"}\n',
        b"[1]\n",
        b"\0" * 9 + b"\n",
    ):
        metrics.write_bytes(whole.replace(b"\n", b"\n" + damage, 1))
        caplog.clear()
        assert report.gather([run])["runs"][0]["training"]["loss"] == losses
        assert f"{metrics}, line 2: is left out: " in caplog.text
    metrics.write_bytes(whole + b'{"step": 400, "lo')
    assert report.gather([run])["runs"][0]["training"]["loss"] == losses
    assert f"line {len(whole.splitlines()) + 1}: is left out: the row was not written to its end" in caplog.text
    metrics.write_bytes(whole + b'{"step": 400, "tokens": 1, "loss": "low"}\n')
    assert one_line_errors(report.run, [run]) == 1
    error = capsys.readouterr().err
    assert f"{metrics}: step 400: loss = 'low'" in error and error.count("\n") == 1


def test_results_of_another_run_or_evaluation_are_not_shown_as_this_one_s(tmp_path, caplog):
    run = make_run(tmp_path / "a", "sympow")
    folder = tmp_path / "a" / "eval"
    result = json.loads((folder / "length_generalisation.json").read_text()) | {"inputs": {"step": 390}}
    write_json(folder / "length_generalisation.json", result)
    curves = {"variant": "sympow", "query_position": 255, "distance": [0, 1], "layers": [LAYER]}
    write_json(folder / "position_bias.json", curves | {"inputs": inputs_digest({"step": 390})})
    assert len(report.gather([run])["biases"]) == 1 and not caplog.records
    write_json(folder / "position_bias.json", curves | {"inputs": inputs_digest({"step": 100})})
    assert report.gather([run])["biases"] == [] and "is of another evaluation" in caplog.text
    write_json(folder / "length_generalisation.json", result | {"seed": 1})
    with pytest.raises(ValueError, match=r"length_generalisation\.json: its seed is 1, and that of the run 0"):
        report.gather([run])


def test_the_page_replaces_no_file_of_a_run(tmp_path, capsys):
    run = make_run(tmp_path / "a", "sympow", evaluated=False)
    for output in (f"{run}/config.json", f"{run}/metrics.jsonl", run):
        assert one_line_errors(report.run, [run, f"--output={output}"]) == 1
        assert "ends in .html" in capsys.readouterr().err


def test_paired_rows_are_differences_from_the_first_run(tmp_path):
    runs = [make_run(tmp_path / "a", "sympow"), make_run(tmp_path / "b", "fox", scale=1.1)]
    data = report.gather(runs)
    first = data["evaluations"][0]["result"]["same_target"]
    for row, own in zip(data["paired"][0]["result"]["same_target"], first, strict=True):
        np.testing.assert_allclose(row["difference"], 0.1 * own["nll"], rtol=1e-4)
    assert [run["cost"]["constant"] for run in data["runs"]] == [True, False]
    assert data["runs"][1]["cost"]["state_bytes"] >= 4 * 256 * 2 * 128 * 4  # keys and values of 4 layers, 256 tokens


def test_cost_of_a_linear_kernel_is_that_of_its_cheaper_form(tmp_path):
    """4 layers of 4 heads of 32: 64 length a head in the quadratic form, 4 * 528 * 33 in the linear one."""
    run = make_run(tmp_path / "a", "sympow")
    config = report.load_config(run)
    near, far = (report._cost(tmp_path / "a", config, length)["flops_per_token"] for length in (256, 1 << 20))
    assert far - near == 16 * (4 * 528 * 33 - 64 * 256)


def test_other_store_is_named_and_does_not_stop_the_report(tmp_path):
    other = dataclasses.replace(make_store(length=256), digest="another", address="gs://longcrawl64/heldout.zarr")
    runs = [make_run(tmp_path / "a", "sympow"), make_run(tmp_path / "b", "sympow", seed=1, store=other)]
    output = tmp_path / "report.html"
    assert report.run([*runs, f"--output={output}"]) == 0
    text = output.read_text()
    assert "used different stores" in text and "Published curves" in text and "sympow (seed 1)" in text
    assert re.search(r"<th>minus [^<]*</th><th></th></tr>", text), "a head for each cell of a row"


@pytest.mark.slow
def test_twenty_runs_stay_small(tmp_path):
    first = make_run(tmp_path / "0", "softmax_nope")
    runs = [first, *(shutil.copytree(first, tmp_path / str(i)) for i in range(1, 20))]
    output = tmp_path / "report.html"
    report.run([*map(str, runs), f"--output={output}"])
    assert output.stat().st_size < 3_000_000
    assert output.read_text().count("softmax_nope [19]") > 1  # equal labels are told apart by the folder


@pytest.mark.parametrize(
    "arguments, message",
    [([], "no run given"), (["nowhere"], "nowhere: no workdir"), (["a", "--outptu=x"], "no such flag.*output")],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert one_line_errors(report.run, arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
