"""Effective remembrance against how many tokens are replaced, and the size of states against position."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sympow_jax.plots import style
from sympow_jax.plots.length_generalisation import curve

Curve = tuple[int, str, Mapping[str, Any]]  # colour index, label, result


def remembrance_figure(result: Mapping[str, Any]) -> Figure:
    """Change of loss, total variation and, where there are any, state norms, from the contents of the JSON file."""
    own: Curve = (0, style.run_labels([result])[0], result)
    with style.styled():
        panels = 3 if result["state_norms"] else 2
        figure = Figure(figsize=(0.3 + 4.0 * panels, 3.6), layout="constrained")
        axes = figure.subplots(1, panels)
        draw_remembrance(axes[0], [own])
        draw_variation(axes[1], [own])
        if panels == 3:
            draw_norms(axes[2], result)
        figure.suptitle(
            f"{own[1]}: the last {result['num_targets']} of {result['length']:,} targets",
            fontsize=9.5,
            x=0.01,
            ha="left",
        )
        figure.supxlabel("bands: 95% intervals over source documents", fontsize=7, color=style.GREY)
    return figure


def draw_remembrance(axes: Axes, curves: Sequence[Curve]) -> None:
    """What the loss of the last targets rises by when so many first tokens of the documents are replaced."""
    _draw(axes, curves, "difference", "ci95")
    axes.axhline(0, color=style.GREY, linewidth=1, zorder=1)
    axes.set_title("effective remembrance")
    axes.set_ylabel("change of loss (nats per token)")


def draw_variation(axes: Axes, curves: Sequence[Curve]) -> None:
    """How far the distributions of the last targets move then."""
    _draw(axes, curves, "total_variation", "total_variation_ci95")
    axes.set_ylim(bottom=0)
    axes.set_title("distance of the predictions")
    axes.set_ylabel("total variation")


def _draw(axes: Axes, curves: Sequence[Curve], value: str, interval: str) -> None:
    """Curves of contexts of several lengths end together, where the targets begin."""
    contexts = [result["length"] - result["num_targets"] for *_, result in curves]
    longest = max(contexts)
    for (index, label, result), context in zip(curves, contexts, strict=True):
        table = result["remembrance"]
        places = [longest - context + position for position in table["position"]]
        rows = [{"nll": nll, "ci95": ci95} for nll, ci95 in zip(table[value], table[interval], strict=True)]
        curve(axes, places, rows, style.line_style(index), label)
    kept = [
        context - p for (*_, r), context in zip(curves, contexts, strict=True) for p in r["remembrance"]["position"]
    ]
    _two_ended_axis(axes, longest, min((n for n in kept if n > 0), default=1))
    _mark_trained(axes, longest, sorted({int(result["train_length"]) for *_, result in curves}))


def _two_ended_axis(axes: Axes, context: int, near: int) -> None:
    """x -> log(near + x) - log(near + context - x): logarithmic from both ends, linear within `near` of them."""

    def forward(x: np.ndarray) -> np.ndarray:
        inside = np.clip(x, 0, context)
        return np.log(near + inside) - np.log(near + context - inside)

    def inverse(y: np.ndarray) -> np.ndarray:
        ratio = np.exp(y)
        return (ratio * (near + context) - near) / (1 + ratio)

    axes.set_xscale("function", functions=(forward, inverse))
    powers = [2**power for power in range(int(np.ceil(np.log2(near))), int(np.log2(max(context, 1))) - 1)]
    shown = powers[:: max(1, -(-len(powers) // 3))]
    ticks = {0: "0", context: "all"} | {tick: style.tokens_label(tick) for tick in shown}
    ticks |= {context - tick: f"-{style.tokens_label(tick)}" for tick in shown}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    axes.set_xlim(0, context)
    axes.set_xlabel("first tokens replaced (-32: all but the last 32)")


def _mark_trained(axes: Axes, context: int, train_lengths: Sequence[int]) -> None:
    """Lines at a training length before the targets, and a light ground further away than any."""
    shown = [length for length in train_lengths if length < context]
    for row, length in enumerate(shown):
        axes.axvline(context - length, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (4, -10 - 10 * row)}
        text = f"trained at {style.tokens_label(length)}"
        axes.annotate(text, (context - length, 1), color=style.GREY, fontsize=7.5, **where)
    if shown and shown[-1] == train_lengths[-1]:
        axes.axvspan(0, context - shown[-1], color="#f3f4f6", zorder=0, linewidth=0)


def draw_norms(axes: Axes, result: Mapping[str, Any]) -> None:
    """Size of each layer's state (solid) and normaliser (dashed) against position, dark to light by depth."""
    positions, layers = result["remembrance"]["position"], result["state_norms"]
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for colour, layer in zip(colours, layers, strict=True):
        for name, dash in (("state", "-"), ("normalizer", (0, (4, 2)))):
            values = style.finite(layer[name])
            label = f"layer {layer['layer']}" if name == "state" else None
            axes.plot(positions, np.where(values > 0, values, np.nan), color=colour, linestyle=dash, label=label)
    axes.set_yscale("log")
    low, high = positions[0], max(positions[-1], 2 * positions[0])
    style.token_axis(axes, low, high)
    axes.set_xlim(low, high)
    style.mark_train_length(axes, [int(result["train_length"])], high)
    axes.set_title("state (solid) and normaliser (dashed)")
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("root mean square")
    if len(layers) <= 8:
        axes.legend(fontsize=7)
