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
    position of the documents. Bands are 95% bootstrap intervals over source documents.

    Args:
      results: length-generalisation results; runs evaluated with the same documents compare best.
      labels: one for each; the variants' names by default.
    """
    labels = list(labels or style.run_labels(results))
    with style.styled():
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        same_target, contextwise = figure.subplots(1, 2, sharey=True)
        trained = [int(result["train_length"]) for result in results]
        longest = max(entry["length"] for result in results for entry in result["lengths"])
        for index, (result, label) in enumerate(zip(results, labels, strict=True)):
            looks = style.line_style(index)
            entries = result["same_target"]
            _curve(same_target, [e["context"] for e in entries], entries, looks, label)
            table = result["contextwise"]
            rows = [{"nll": nll, "ci95": ci95} for nll, ci95 in zip(table["nll"], table["ci95"], strict=True)]
            shown = [i for i, position in enumerate(table["position"]) if position >= FIRST_POSITION]
            positions = [table["position"][i] for i in shown]
            _curve(contextwise, positions, [rows[i] for i in shown], looks | {"marker": ""}, label)
        targets = {result.get("num_targets") for result in results} - {None}
        which = f"the last {targets.pop()} tokens" if len(targets) == 1 else "the same final tokens"
        same_target.set_title(f"{which} of each document")
        contextwise.set_title("every token, by its position")
        same_target.set_xlabel("context (tokens)")
        contextwise.set_xlabel("position (tokens)")
        same_target.set_ylabel("loss (nats per token)")
        contextwise.tick_params(labelleft=False)
        for axes in (same_target, contextwise):
            low = min(float(np.min(line.get_xdata())) for line in axes.get_lines())
            high = max(longest, 2 * low)
            margin = (high / low) ** 0.03
            style.token_axis(axes, low, high)
            axes.set_xlim(low / margin, high * margin)
            style.mark_train_length(axes, trained, high * margin)
        handles, names = same_target.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), fontsize=8.5)
        note = "grey: longer than any training context; bands: 95% bootstrap intervals over source documents"
        figure.supxlabel(note, fontsize=7, color=style.GREY)
    return figure


def _curve(axes: Axes, x: Sequence[float], rows: Sequence[Mapping], looks: Mapping[str, Any], label: str) -> None:
    low, high = style.interval([row["ci95"] for row in rows])
    axes.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    axes.plot(x, style.finite([row["nll"] for row in rows]), label=label, markersize=4, **looks)
