"""The report's small figures, one set of axes each, as inline SVG that scales to the width of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sympow_jax.plots import style
from sympow_jax.plots.length_generalisation import contextwise_rows, curve, draw_contextwise, draw_same_target
from sympow_jax.plots.remembrance import Curve, draw_norms, draw_remembrance, draw_variation

MAX_POINTS = 240  # of a training curve
LOWEST_LOG_WEIGHT = -20.0  # less is as good as nothing


def panel(draw, *arguments: Any, title: str = "") -> str:
    """`draw(axes, *arguments)` as an <svg> element."""
    with style.styled():
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        draw(axes, *arguments)
        if title:
            axes.set_title(title)
    return style.svg(figure)


def same_target(results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Loss on the same final tokens under growing context."""
    return panel(draw_same_target, results, labels)


def contextwise(results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Loss by position."""
    return panel(draw_contextwise, results, labels)


def has_positions(difference: Mapping[str, Any]) -> bool:
    """Whether `paired` has anything to draw of a difference: bins that both runs have, of positions that are drawn."""
    table = difference["contextwise"]
    return bool(table and contextwise_rows(table, "difference")[0])


def paired(differences: Sequence[tuple[int, Mapping[str, Any]]], baseline: str, train_lengths: Sequence[int]) -> str:
    """Loss by position minus that of the baseline, with intervals of the paired difference; (colour index, result)."""

    def draw(axes: Axes) -> None:
        low, high = np.inf, 0.0
        for index, result in differences:
            positions, rows = contextwise_rows(result["contextwise"], "difference")
            curve(axes, positions, rows, style.line_style(index) | {"marker": ""}, str(index))
            low, high = min(low, positions[0]), max(high, positions[-1])
        axes.axhline(0, color=style.COLOURS[0], linewidth=1.2)
        style.token_axis(axes, low, high)
        style.mark_train_length(axes, train_lengths, high)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("difference (nats per token)")

    return panel(draw, title=f"loss minus that of {baseline}")


def training(runs: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Training loss, averaged over windows of steps, against tokens; held-out loss as points; (colour index, run)."""

    def draw(axes: Axes) -> None:
        for index, run in runs:
            looks = style.line_style(index)
            tokens, loss = _averaged(run["tokens"], run["loss"])
            axes.plot(tokens, loss, color=looks["color"], linestyle=looks["linestyle"], linewidth=1.2)
            axes.plot(
                run["heldout_tokens"], style.finite(run["heldout_loss"]), color=looks["color"], marker=looks["marker"],
                markersize=5, linestyle="none", markeredgecolor="white", zorder=5,
            )  # fmt: skip
        losses = np.concatenate([style.finite(run["loss"]) for _, run in runs])
        tail = losses[np.isfinite(losses)]
        if len(tail):
            axes.set_ylim(tail.min() - 0.05, np.quantile(tail, 0.92) + 0.05)
        axes.xaxis.set_major_formatter(lambda value, _: style.quantity(value))
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss (nats per token)")

    return panel(draw, title="training loss (lines) and held-out loss (points)")


def _averaged(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS means of consecutive rows."""
    if not len(x):
        return np.zeros(0), np.zeros(0)
    groups = min(MAX_POINTS, len(x))
    pairs = zip(np.array_split(np.asarray(x, float), groups), np.array_split(style.finite(y), groups), strict=True)
    means = [(a.mean(), b.mean()) for a, b in pairs]
    return np.asarray([a for a, _ in means]), np.asarray([b for _, b in means])


def cost(points: Sequence[tuple[int, float, float | None]], xlabel: str, unit: str) -> str:
    """Loss at the longest context against a cost on a logarithmic axis; (colour index, cost, loss)."""

    def draw(axes: Axes) -> None:
        for index, value, loss in points:
            looks = style.line_style(index)
            axes.plot([value], style.finite([loss]), color=looks["color"], marker=looks["marker"], markersize=7)
        values = [value for _, value, _ in points]
        low, high = min(values) / 1.3, max(values) * 1.3
        axes.set_xscale("log")
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        steps = (1, 2, 3, 5, 7) if high / low < 4 else (1, 2, 5) if high / low < 100 else (1,)
        ticks = [tick for tick in np.outer(decades, steps).ravel().tolist() if low <= tick <= high]
        axes.set_xticks(ticks, [style.quantity(tick, unit) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low, high)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("same-target loss, longest context")

    return panel(draw)


def biases(curves: Mapping[str, Any], title: str) -> str:
    """Log weight of a key against its distance, one line a head, one colour a layer; see evals.distance_curves."""

    def draw(axes: Axes) -> None:
        distance = np.asarray(curves["distance"], float)
        lowest, highest = 0.0, 0.0
        for number, layer in enumerate(curves["layers"]):
            looks = style.line_style(number)
            for head, values in enumerate(layer["log_weight"]):
                label = f"layer {layer['layer']}" if head == 0 else None
                values = style.finite(values)
                axes.plot(
                    distance, values, color=looks["color"], linestyle=looks["linestyle"], linewidth=1, label=label
                )
                lowest, highest = np.fmin(lowest, np.fmin.reduce(values)), np.fmax(highest, np.fmax.reduce(values))
        axes.set_ylim(max(lowest, LOWEST_LOG_WEIGHT) - 0.2, highest + 0.2)
        axes.set_xscale("symlog", base=4, linthresh=1)
        ticks = [0, *(4**power for power in range(int(np.log(distance[-1]) / np.log(4)) + 1))]
        axes.set_xticks(ticks, [style.tokens_label(tick) for tick in ticks])
        axes.set_xlim(0, distance[-1])
        axes.set_xlabel("distance (tokens)")
        axes.set_ylabel("log weight")
        if len(curves["layers"]) <= 8:
            axes.legend(fontsize=7, loc="lower left")

    return panel(draw, title=title)


def remembrance(curves: Sequence[Curve]) -> str:
    """Change of loss of the last targets against how many first tokens are replaced."""
    return panel(draw_remembrance, curves)


def variation(curves: Sequence[Curve]) -> str:
    """Total variation of what predicts them, likewise."""
    return panel(draw_variation, curves)


def norms(result: Mapping[str, Any], title: str) -> str:
    """Size of the state and normaliser of each layer by position."""
    return panel(draw_norms, result, title=title)


def published(series: Mapping[str, Mapping[str, Any]], results: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Contextwise curves of the runs, (colour index, result), over published ones in grey."""

    def draw(axes: Axes) -> None:
        lowest, longest = [], 0.0
        for index, result in results:
            positions, rows = contextwise_rows(result["contextwise"], "nll")
            curve(axes, positions, rows, style.line_style(index) | {"marker": ""}, "")
            lowest.append(np.fmin.reduce(style.finite([row["nll"] for row in rows]), initial=np.inf))
            longest = max([longest, *positions])
        for dash, (name, points) in zip(("-", "--", "-.", ":"), series.items(), strict=True):
            x, y = (
                np.asarray(points["x"])[1:],
                np.asarray(points["y"])[1:],
            )  # the next point after the first is far away
            axes.plot(x, y, color="#9ca3af", linewidth=1.1, linestyle=dash, label=name)
            lowest.append(y.min())
            longest = max(longest, x[-1])
        axes.legend(fontsize=7, loc="upper left", handlelength=3)
        style.token_axis(axes, 64, longest)
        axes.set_xlim(64, longest)
        axes.set_ylim(min(lowest) - 0.1, min(lowest) + 2)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("loss (nats per GPT-2 token)")

    return panel(draw, title="grey: published, trained at 16k")
