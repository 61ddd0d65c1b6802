import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from sympow_jax.plots import seeds, style, tables
from sympow_jax.plots.distance_curves import distance_figure
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from tests.plots.results import length_result


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draws_several_runs_and_marks_the_training_length(tmp_path, suffix):
    figure = length_generalisation_figure(
        [length_result(), length_result("softmax_rope", 0.3), length_result("sympow", 0.1)]
    )
    path = style.save(figure, tmp_path / f"lengths.{suffix}")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    left = figure.axes[0]
    curves = [line for line in left.get_lines() if len(line.get_xdata()) == 4]
    assert len(curves) == 3
    np.testing.assert_allclose(curves[1].get_ydata(), [2.0, 2.3, 2.6, 2.9])
    assert texts(figure) == ["trained at 512"] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["conformal_sympow", "softmax_rope", "sympow"]
    if suffix == "png":
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 1200 and pixels.std() > 0.05


def test_one_length_without_intervals_still_draws(tmp_path):
    result = length_result(intervals=False)
    for key in ("lengths", "same_target"):
        result[key] = result[key][:1]
    style.save(length_generalisation_figure([result]), tmp_path / "one.png")
    result["contextwise"]["position"] = [place / 1e6 for place in result["contextwise"]["position"]]  # none to draw
    style.save(length_generalisation_figure([result]), tmp_path / "short.png")


def test_labels_tell_runs_apart():
    runs = [length_result(seed=0), length_result(seed=1) | {"position_overrides": {"scaling": "yarn"}}]
    assert style.run_labels(runs) == ["conformal_sympow (seed 0)", "conformal_sympow (seed 1, scaling=yarn)"]


@pytest.mark.parametrize(
    "tokens, label", [(512, "512"), (1024, "1k"), (1536, "1,536"), (65536, "64k"), (1 << 20, "1M"), (100.5, "100")]
)
def test_tokens_label(tokens, label):
    assert style.tokens_label(tokens) == label


def test_more_runs_than_colours_stay_distinct():
    looks = {(look["color"], str(look["linestyle"])) for look in map(style.line_style, range(20))}
    assert len(looks) == 20


def test_table_shows_every_length_and_the_paired_change():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(tables.length_table(length_result()))
    text = console.export_text()
    assert "4,096" in text and "-0.1500" in text and "[-0.160, -0.140]" in text and "30 sources" in text


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(slope=-0.05), "no rise above that at 512 tokens and is lower at 4,096, up to 4,096 tokens (8x"),
        (dict(slope=0.05), "at 1,024 tokens is higher than at 512; tested up to 4,096"),
        (dict(slope=0.0), "no rise above that at 512 tokens, up to 4,096"),
        (dict(train_length=4096), "No context beyond the training length of 4,096"),
        (dict(intervals=False), "too few source documents"),
    ],
)
def test_verdict_never_says_more_than_was_tested(changes, expected):
    sentence = tables.verdict(length_result(**changes))
    assert expected in sentence
    assert "generalis" not in sentence


def test_the_verdict_says_what_context_is_worth():
    gains = [
        {"from_context": 32, "to_context": 512, "gain": 0.8, "ci95": [0.75, 0.85]},
        {"from_context": 512, "to_context": 4096, "gain": -0.01, "ci95": [None, None]},
    ]
    sentence = tables.verdict(length_result() | {"gained_from_context": gains})
    assert "+0.8000 [+0.7500, +0.8500] from 32 to 512 tokens, -0.0100 from 512 to 4,096 tokens." in sentence
    assert "no rise above" in sentence
    assert tables.verdict(length_result()).startswith("Same-target loss")  # a file of an earlier version


def test_plots_import_neither_jax_nor_the_rest():
    code = (
        "import sys, sympow_jax.plots.length_generalisation, sympow_jax.plots.tables, sympow_jax.plots.heatmap;"
        "bad = [n for n in sys.modules if n == 'jax' or n.startswith(('jax.', 'sympow_jax.'))];"
        "assert all(n.startswith('sympow_jax.plots') for n in bad), bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_seeds_of_a_variant_share_its_colour():
    results = [length_result(variant, seed=seed) for seed in range(2) for variant in ("sympow", "fox")]
    looks = [style.line_style(index) for index in style.line_indices(results)]
    assert [look["color"] for look in looks] == [style.COLOURS[0], style.COLOURS[1]] * 2
    assert looks[0]["linestyle"] == looks[1]["linestyle"] != looks[2]["linestyle"]
    assert style.line_indices([length_result(str(i)) for i in range(9)]) == list(range(9))


@pytest.mark.parametrize("label", ["fox", "sympow_gated,carried (3 seeds)", "a" * 70])
def test_the_legend_is_within_the_figure(label):
    figure = length_generalisation_figure([length_result()] * 10, [f"{label} {i}" for i in range(10)])
    figure.draw_without_rendering()
    width = figure.legends[0].get_window_extent().width
    assert width <= figure.bbox.width and (label != "fox" or figure.legends[0]._ncols == 4)


def test_a_long_legend_makes_the_figure_higher_not_the_axes_lower():
    heights = []
    for count in (9, 19):
        runs = [length_result(f"variant_with_a_long_name_{number}") for number in range(count)]
        figure = length_generalisation_figure(runs)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_seeds_are_one_line_with_students_interval():
    results = [length_result("fox", slope, seed=seed) for seed, slope in enumerate((-0.1, 0.0, 0.1))]
    pooled = seeds.over_seeds(results)
    longest = pooled["same_target"][-1]
    assert longest["nll"] == pytest.approx(2.0)
    half = 4.30265 * 0.3 / 3**0.5  # t of 2 degrees of freedom; 1.7, 2.0 and 2.3 deviate by 0.3
    np.testing.assert_allclose(longest["ci95"], [2 - half, 2 + half], rtol=1e-5)
    assert style.run_labels([pooled, length_result("sympow")]) == ["fox (3 seeds)", "sympow"]
    axes = length_generalisation_figure([pooled]).axes[0]
    assert len([line for line in axes.get_lines() if len(line.get_xdata()) == 4]) == 1
    assert len({seeds.comparable(result) for result in results}) == 1
    assert seeds.comparable(length_result("sympow")) != seeds.comparable(results[0])


@pytest.mark.parametrize(
    ("gains", "remembered"), [((0.2, 0.21, 0.19), 0.5), ((0.2, 0.001, 0.05), None), ((0.2, None, 0.2), None)]
)
def test_seeds_remember_no_share_of_a_gain_that_may_be_nothing(gains, remembered):
    """Each seed's own gain is above 0 by its documents, but their mean is not by the seeds."""
    results = [length_result("fox", seed=seed) for seed in range(len(gains))]
    for result, gain in zip(results, gains, strict=True):
        row = {"from_context": 32, "to_context": 512, "gain": gain, "ci95": [gain and gain / 2, gain and 2 * gain]}
        result |= {"gained_from_context": [row], "remembered_share": {"share": 0.5, "ci95": [0.4, 0.6]}}
    assert seeds.over_seeds(results).get("remembered_share", {}).get("share") == remembered


def test_a_training_length_beyond_the_axes_leaves_them_their_size(tmp_path):
    for train_length, shaded in ((1 << 20, 0), (4, 2)):
        figure = length_generalisation_figure([length_result(train_length=train_length)])
        assert texts(figure) == [] and sum(len(axes.patches) for axes in figure.axes) == shaded
        style.save(figure, tmp_path / "beyond.png")
        assert figure.axes[0].get_position().width > 0.35


def test_without_an_interval_the_verdict_is_none():
    result = length_result(intervals=False)
    assert tables.verdict(result) == "Tested up to 4,096 tokens; too few source documents for an interval."
    assert tables.short_verdict(result) == "no interval"
    result["same_target_change"]["difference"][-1] = None
    assert tables.verdict(result) == "Tested up to 4,096 tokens; a loss is not finite."


def test_curves_that_are_not_finite_have_their_figure(tmp_path):
    curves = {"variant": "fox", "query_position": 2, "distance": [0, 1, 2]}
    for values in ([0.0, None, -1.0], [None] * 3):
        layers = [{"layer": 0, "log_weight": [values]}]
        style.save(distance_figure(curves | {"layers": layers}), tmp_path / "curves.png")
