"""Recall against the size of the state, as Zoology (arXiv 2312.04927) and Based (arXiv 2402.18668) draw it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from sympow_jax.plots import style
from sympow_jax.plots.sweep_tables import recall_points


def recall_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against bytes of state, a line a family: the mean of the seeds, each seed as a dot."""
    points = [point for point in recall_points(results) if point["state_bytes"]]
    families = list(dict.fromkeys(point["family"] for point in points))
    with style.styled():
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, family in enumerate(families):
            own = sorted((p for p in points if p["family"] == family), key=lambda point: point["state_bytes"])
            looks = style.line_style(number)
            x = [point["state_bytes"] for point in own]
            axes.plot(x, style.finite([point["mean"] for point in own]), label=family, markersize=5, **looks)
            for point in own:
                dots = style.finite(point["accuracies"])
                axes.plot([point["state_bytes"]] * len(dots), dots, ".", color=looks["color"], alpha=0.45, markersize=4)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: style.quantity(value, "B"))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("state of one stream (softmax: its cache at the trained length)")
        axes.set_ylabel("answers right at the trained length")
        style.legend(figure, axes)
        figure.supxlabel("lines: means; small dots: single seeds", fontsize=7, color=style.GREY)
    return figure
