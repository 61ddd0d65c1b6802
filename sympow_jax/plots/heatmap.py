"""Heat maps of retrieval accuracy: length against depth, or against number of pairs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sympow_jax.plots import style


def accuracy_heatmap(result: Mapping[str, Any], *, title: str = "") -> Figure:
    """Accuracy over a grid, from a retrieval result.

    Args:
      result: {"columns": {"name", "values"}, "rows": {"name", "values"}, "accuracy": [rows, columns], null where not
        tested; "train_length" when the columns are lengths}.
      title: above the figure.
    """
    columns, rows = result["columns"], result["rows"]
    accuracy = np.stack([style.finite(row) for row in result["accuracy"]])
    height, width = accuracy.shape
    with style.styled():
        figure = Figure(figsize=(1.6 + 0.62 * width, 1.1 + 0.36 * height), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(width), [_label(columns["name"], value) for value in columns["values"]])
        axes.set_yticks(range(height), [_label(rows["name"], value) for value in rows["values"]])
        axes.set_xlabel(columns["name"])
        axes.set_ylabel(rows["name"])
        for (row, column), value in np.ndenumerate(accuracy):
            text = "-" if np.isnan(value) else f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="#111827")
        train_length = result.get("train_length")
        if train_length and "length" in columns["name"]:
            trained = sum(value <= train_length for value in columns["values"])
            if 0 < trained < width:
                axes.axvline(trained - 0.5, color="#111827", linewidth=1.2, linestyle=(0, (4, 3)))
        if title:
            axes.set_title(title)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0%", "50%", "100%"])
        bar.outline.set_visible(False)
    return figure


def _label(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if "length" in name:
        return style.tokens_label(value)
    return f"{100 * value:.0f}%" if "depth" in name else f"{value:g}"
