"""The length-generalisation figure: same-target loss against context, and loss against position."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sympow_jax.plots import style

FIRST_POSITION = 16  # earlier bins hold one or two positions each and are all noise


def length_generalisation_figure(results: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figure:
    """Two panels over one or several runs, from the contents of their eval/<name>.json files.

    Left, same-target loss: the same final tokens of every document under growing context. Right, the loss at each
    position of the documents. Bands are 95% bootstrap intervals over source documents, or what `seeds.over_seeds` says
    of several seeds.

    Args:
      results: length-generalisation results; runs evaluated with the same documents compare best.
      labels: one for each; the variants' names by default.
    """
    labels = list(labels or style.run_labels(results))
    with style.styled():
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        draw_same_target(left, results, labels)
        draw_contextwise(right, results, labels)
        right.set_ylabel("")
        right.tick_params(labelleft=False)
        style.legend(figure, left)
        pooled = any(result.get("num_seeds", 1) > 1 for result in results)
        over = "seeds, or over source documents where there is one seed" if pooled else "source documents"
        note = f"grey: longer than any training context; bands: 95% intervals over {over}"
        figure.supxlabel(note, fontsize=7, color=style.GREY)
    return figure


def draw_same_target(axes: Axes, results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Loss on the same final tokens of every document, against the context that they are given."""
    for index, result, label in zip(style.line_indices(results), results, labels, strict=True):
        rows = result["same_target"]
        curve(axes, [row["context"] for row in rows], rows, style.line_style(index), label)
    targets = {result.get("num_targets") for result in results} - {None}
    which = f"the last {targets.pop()} tokens" if len(targets) == 1 else "the same final tokens"
    axes.set_title(f"{which} of each document")
    _finish(axes, results, "context (tokens)")


def draw_contextwise(axes: Axes, results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Loss on every token, against its position."""
    for index, result, label in zip(style.line_indices(results), results, labels, strict=True):
        positions, rows = contextwise_rows(result["contextwise"], "nll")
        curve(axes, positions, rows, style.line_style(index) | {"marker": ""}, label)
    axes.set_title("every token, by its position")
    _finish(axes, results, "position (tokens)")


def contextwise_rows(table: Mapping[str, Any], value: str) -> tuple[list[float], list[dict[str, Any]]]:
    """Positions from FIRST_POSITION on, and their {"nll", "ci95"}; `value` names the column."""
    rows = zip(table["position"], table[value], table["ci95"], strict=True)
    shown = [(position, nll, ci95) for position, nll, ci95 in rows if position >= FIRST_POSITION]
    return [position for position, _, _ in shown], [{"nll": nll, "ci95": ci95} for _, nll, ci95 in shown]


def _finish(axes: Axes, results: Sequence[Mapping[str, Any]], label: str) -> None:
    positions = [float(np.min(line.get_xdata())) for line in axes.get_lines() if np.size(line.get_xdata())]
    low = min(positions, default=1.0)
    high = max(2 * low, *(entry["length"] for result in results for entry in result["lengths"]))
    margin = (high / low) ** 0.03
    style.token_axis(axes, low, high)
    axes.set_xlim(low / margin, high * margin)
    style.mark_train_length(axes, [int(result["train_length"]) for result in results], high * margin)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")


def curve(axes: Axes, x: Sequence[float], rows: Sequence[Mapping], looks: Mapping[str, Any], label: str) -> None:
    """A line of {"nll", "ci95"} rows with the interval as a band."""
    low, high = style.interval([row["ci95"] for row in rows])
    axes.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    axes.plot(x, style.finite([row["nll"] for row in rows]), label=label, markersize=4, **looks)
