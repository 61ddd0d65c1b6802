import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sympow_jax.plots import style, tables
from sympow_jax.plots.remembrance import draw_remembrance, remembrance_figure
from tests.plots.results import remembrance_result


@pytest.mark.parametrize(("layers", "intervals", "panels"), [((0, 2), True, 3), ((), False, 2), (range(12), True, 3)])
def test_what_is_kept_is_drawn_from_nothing_to_all_and_states_by_position(tmp_path, layers, intervals, panels):
    result = remembrance_result(layers=layers, intervals=intervals)
    figure = remembrance_figure(result)
    style.save(figure, tmp_path / "remembrance.png")
    assert len(figure.axes) == panels
    change, variation, *norms = figure.axes
    table = result["remembrance"]
    for axes, name in ((change, "difference"), (variation, "total_variation")):
        line = next(line for line in axes.get_lines() if len(line.get_xdata()) == 8)
        np.testing.assert_array_equal(line.get_xdata(), table["position"])
        np.testing.assert_array_equal(line.get_ydata(), table[name])
        assert axes.get_xlim() == (0, 3840) and "trained at 512" in [text.get_text() for text in axes.texts]
        scale = axes.xaxis.get_transform()
        steps = scale.transform(np.asarray([0.0, 64, 1920, 3776, 3840]))
        np.testing.assert_allclose(steps, -steps[::-1], atol=1e-12)  # both ends alike
        np.testing.assert_allclose(scale.inverted().transform(steps), [0, 64, 1920, 3776, 3840], atol=1e-9)
    for axes in norms:
        lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 8]
        assert len(lines) == 2 * len(layers) and axes.get_yscale() == "log"
        np.testing.assert_allclose(lines[0].get_ydata(), result["state_norms"][0]["state"])
        np.testing.assert_allclose(lines[1].get_ydata(), result["state_norms"][0]["normalizer"])


def test_contexts_of_several_lengths_end_at_their_targets():
    short = remembrance_result("sympow")
    short |= {"length": 1024, "remembrance": short["remembrance"] | {"position": [*range(96, 769, 96)]}}
    axes = Figure().subplots()
    draw_remembrance(axes, [(0, "long", remembrance_result()), (1, "short", short)])
    ends = [line.get_xdata()[-1] for line in axes.get_lines() if len(line.get_xdata()) == 8]
    assert ends == [3840, 3840] and axes.get_lines()[1].get_xdata()[0] == 3840 - 768 + 96


def test_the_table_has_every_position():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(tables.remembrance_table(remembrance_result()))
    text = console.export_text()
    assert (
        "3,584" in text and "256" in text and "+0.2000 [+0.1800, +0.2200]" in text and "2.0000 nats per token" in text
    )
    assert len([line for line in text.splitlines() if "[" in line]) == 8
