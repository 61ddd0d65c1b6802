"""The look that all figures share."""

import contextlib
import io
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, and after it the same colours dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vP"
GREY = "#6b7280"

_RC: dict[Any, Any] = {
    "font.size": 9,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#111827",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "sympow_jax",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draws with the style of this module, leaving the caller's settings alone."""
    with mpl.rc_context(_RC):
        yield


def legend(figure: Figure, axes: Axes) -> None:
    """The lines of `axes` above the figure, in as many columns, up to four, as its width has room for.

    Rows beyond the third make the figure higher: what is drawn keeps its size.
    """
    handles, names = axes.get_legend_handles_labels()
    column = 0.7 + 0.075 * max(map(len, names), default=0)  # inches: a line, and letters of this size
    count = max(1, min(4, len(names), int(figure.get_figwidth() / column)))
    rows = -(-len(names) // count)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 3))
    figure.legend(handles, names, loc="outside upper left", ncols=count, fontsize=8.5, handlelength=3)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the index-th run."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "marker": MARKERS[index % len(MARKERS)]}


def line_indices(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices for line_style: runs of one variant share a colour and differ by dash, while there are enough of both."""
    variants = [str(result.get("variant")) for result in results]
    distinct = list(dict.fromkeys(variants))
    if len(distinct) > len(COLOURS) or max(map(variants.count, distinct), default=0) > len(DASHES):
        return list(range(len(results)))
    return [distinct.index(name) + len(COLOURS) * variants[:i].count(name) for i, name in enumerate(variants)]


def tokens_label(tokens: float) -> str:
    """512 -> '512', 4096 -> '4k', 65536 -> '64k', 1048576 -> '1M', 1500 -> '1,500'."""
    count = round(tokens)
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def quantity(value: float, unit: str = "") -> str:
    """1.2e6 -> '1.2 M', with unit 'B' '1.2 MB': three digits and a decimal prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def token_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis of tokens with powers of two as ticks."""
    axes.set_xscale("log", base=2)
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 8))
    ticks = [2**power for power in range(last, first - 1, -step)][::-1]
    axes.set_xticks(ticks, [tokens_label(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def mark_train_length(axes: Axes, train_lengths: Iterable[int], high: float) -> None:
    """A dashed line at each training length within the axes, and a light ground where no run was trained."""
    lengths, (left, right) = sorted(set(train_lengths)), axes.get_xlim()
    shown = [length for length in lengths if left <= length <= right]  # text beyond would press the axes together
    for length in shown:
        axes.axvline(length, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if lengths and lengths[-1] < high:
        axes.axvspan(max(lengths[-1], left), high, color="#f3f4f6", zorder=0, linewidth=0)
    for row, length in enumerate(shown):
        axes.annotate(
            f"trained at {tokens_label(length)}",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10 - 10 * row),
            textcoords="offset points",
            color=GREY,
            fontsize=7.5,
        )


def finite(values: Sequence[Any]) -> np.ndarray:
    """JSON numbers as an array, null as NaN."""
    return np.asarray([math.nan if value is None else value for value in values], float)


def interval(entries: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of a list of [lo, hi]."""
    return finite([pair[0] for pair in entries]), finite([pair[1] for pair in entries])


def run_labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells the runs apart: the variant, with the seed and position overrides where needed."""
    names = [str(result.get("variant") or "run") for result in results]
    seeds: dict[str, set] = {}
    for name, result in zip(names, results, strict=True):
        seeds.setdefault(name, set()).add(result.get("seed"))
    labels = []
    for name, result in zip(names, results, strict=True):
        overrides = result.get("position_overrides") or {}
        extra = [f"seed {result.get('seed')}"] if len(seeds[name]) > 1 else []
        if result.get("num_seeds", 1) > 1:
            extra = [f"{result['num_seeds']} seeds"]
        extra += [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in overrides.items()
        ]
        labels.append(f"{name} ({', '.join(extra)})" if extra else name)
    return labels


def save(figure: Figure, path: str | os.PathLike, *, dpi: int = 160) -> pathlib.Path:
    """Writes the figure (png, svg or pdf, by the suffix); a reader sees the old file or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = pathlib.Path(folder) / path.name
        with styled():
            figure.savefig(whole, dpi=dpi)
        os.replace(whole, path)
    return path


def svg(figure: Figure) -> str:
    """The figure as an <svg> element without an XML header."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
