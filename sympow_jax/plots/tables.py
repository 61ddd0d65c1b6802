"""Evaluation results as tables for the terminal, and in one honest sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from sympow_jax.plots.style import run_labels


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(pair: Sequence[float | None], form: str = ".4f") -> str:
    return "" if None in pair else f"[{pair[0]:{form}}, {pair[1]:{form}}]"


def length_table(result: Mapping[str, Any]) -> Table:
    """One row for each length: same-target loss, its paired change from the training length, and prefix loss."""
    change = result["same_target_change"]
    title = (
        f"{run_labels([result])[0]}, trained at {result['train_length']:,} tokens; nats per token, 95% intervals over "
        f"{result['num_documents']} documents from {result['num_sources']} sources"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("context", justify="right")
    table.add_column("x train", justify="right")
    table.add_column(f"same target\n(last {result['num_targets']})", justify="right")
    table.add_column(f"change from {change['from_context']:,}\n(95% interval)", justify="right")
    table.add_column("prefix mean\n(95% interval)", justify="right")
    rows = zip(result["lengths"], result["same_target"], change["difference"], change["ci95"], strict=True)
    for prefix, same, difference, ci95 in rows:
        reference = same["context"] == change["from_context"]
        table.add_row(
            f"{same['context']:,}",
            f"{same['context'] / result['train_length']:.3g}",
            _loss(same["nll"]),
            "" if reference or difference is None else f"{difference:+.4f} {_interval(ci95, '+.3f')}",
            f"{_loss(prefix['nll'])} {_interval(prefix['ci95'], '.2f')}",
        )
    return table


def gained(result: Mapping[str, Any]) -> str:
    """What context is worth, up to the trained length and beyond it; "" for a result without shorter or longer ones."""
    parts = [
        f"{_signed(row['gain'])} {_interval(row['ci95'], '+.4f')}".rstrip()
        + f" from {row['from_context']:,} to {row['to_context']:,} tokens"
        for row in result.get("gained_from_context") or ()
    ]
    return f"Gained from context, in nats per token: {', '.join(parts)}." if parts else ""


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def verdict(result: Mapping[str, Any]) -> str:
    """What context is worth, and whether it hurts beyond the trained length: never more than the longest tested."""
    return " ".join(filter(None, (gained(result), _beyond_training(result))))


def _beyond_training(result: Mapping[str, Any]) -> str:
    """What the same-target curve shows beyond the training length.

    Compares each context beyond the training length with the loss at the training length by the interval of the
    paired difference: higher when the whole interval lies above 0, lower when it lies below.
    """
    change, train_length = result["same_target_change"], result["train_length"]
    start, longest = change["from_context"], change["context"][-1]
    beyond = _beyond(result)
    if not beyond:
        return f"No context beyond the training length of {train_length:,} tokens was tested."
    if "unknown" in beyond.values():
        why = "a loss is not finite" if None in change["difference"] else "too few source documents for an interval"
        return f"Tested up to {longest:,} tokens; {why}."
    higher, lower = ([c for c, kind in beyond.items() if kind == which] for which in ("higher", "lower"))
    times = f"{longest / train_length:.3g}x the training length"
    if higher:
        return (
            f"Same-target loss at {higher[0]:,} tokens is higher than at {start:,}; tested up to {longest:,} ({times})."
        )
    gain = f" and is lower at {lower[-1]:,}" if lower else ""
    return (
        f"Same-target loss shows no rise above that at {start:,} tokens{gain}, up to {longest:,} tokens ({times}), "
        "the longest tested."
    )


def short_verdict(result: Mapping[str, Any]) -> str:
    """The verdict in a few words, for a table cell."""
    beyond = _beyond(result)
    if not beyond:
        return "not tested"
    if "unknown" in beyond.values():
        return "no interval"
    higher = [context for context, kind in beyond.items() if kind == "higher"]
    return f"higher at {higher[0]:,}" if higher else f"no rise up to {result['same_target_change']['context'][-1]:,}"


def _beyond(result: Mapping[str, Any]) -> dict[int, str]:
    """Each context beyond the training length: higher, lower, level or unknown."""
    change, kinds = result["same_target_change"], {}
    for context, (low, high) in zip(change["context"], change["ci95"], strict=True):
        if context > max(change["from_context"], result["train_length"]):
            if low is None or high is None:
                kinds[context] = "unknown"
            else:
                kinds[context] = "higher" if low > 0 else "lower" if high < 0 else "level"
    return kinds


def remembrance_table(result: Mapping[str, Any]) -> Table:
    """One row for each position: what the loss of the last targets and their distributions owe to the tokens before."""
    table, context = result["remembrance"], result["length"] - result["num_targets"]
    title = (
        f"{run_labels([result])[0]}, trained at {result['train_length']:,} tokens; the last {result['num_targets']} of "
        f"{result['length']:,} targets, loss {_loss(result['loss']['nll'])} nats per token, 95% intervals over "
        f"{result['num_documents']} documents from {result['num_sources']} sources"
    )
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("replaced before", "kept", "change of loss\n(95% interval)", "total variation\n(95% interval)"):
        shown.add_column(head, justify="right")
    for position, change, ci95, variation, variation_ci95 in zip(*(table[name] for name in _REMEMBRANCE), strict=True):
        shown.add_row(
            f"{position:,}",
            f"{context - position:,}",
            f"{_signed(change)} {_interval(ci95, '+.4f')}",
            f"{_loss(variation)} {_interval(variation_ci95)}",
        )
    return shown


_REMEMBRANCE = ("position", "difference", "ci95", "total_variation", "total_variation_ci95")


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Percent of answer tokens that are right, with intervals over examples: rows of the grid against its columns."""
    columns, rows = result["columns"], result["rows"]
    title = (
        f"{run_labels([result])[0]}, {result['task']}: percent of answer tokens right, 95% intervals over "
        f"{result['num_examples']} examples a cell; trained at {result['train_length']:,} tokens"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{rows['name']} \\ {columns['name']}", justify="right")
    for value in columns["values"]:
        table.add_column(f"{value:,}", justify="right")
    for value, accuracies, intervals in zip(rows["values"], result["accuracy"], result["ci95"], strict=True):
        cells = zip(accuracies, intervals, strict=True)
        table.add_row(str(value), *["-" if a is None else f"{100 * a:.1f} {_percent(ci)}" for a, ci in cells])
    return table


def _percent(pair: Sequence[float | None]) -> str:
    return _interval([None if end is None else 100 * end for end in pair], ".1f")
