"""The tables of a sweep in Markdown: one row a run, one row a variant over its seeds, one row a size of state."""

from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax.plots.seeds import comparable, grouped, mean_and_interval, over_seeds

NEAR = 1.05  # times the best prefix loss: a variant beyond it has not learned enough to be compared by its order


def pooled(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Length-generalisation results of a sweep with the seeds of a variant as one; see seeds.over_seeds."""
    members = grouped([comparable(result) for result in results], [result["seed"] for result in results])
    return [over_seeds([results[place] for place in places]) for places in members]


def runs_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Same-target loss of each run at each context, its paired change beyond the trained one, prefix loss there."""
    longest, trained, columns = _contexts(results)
    lines = [f"| variant | seed | {columns} | change to {longest:,} [95%] | prefix at {trained:,} |"]
    lines.append("|---|---|" + "---|" * (len(results[0]["same_target"]) + 2))
    for result in results:
        losses = " | ".join(_number(row["nll"]) for row in result["same_target"])
        prefix = _number(_prefix(result, trained))
        lines.append(f"| {result['variant']} | {result['seed']} | {losses} | {_change(result)} | {prefix} |")
    return "\n".join(lines) + "\n"


def variants_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a variant: means over its seeds, what context gives it, and whether it has learned as much as the best.

    A prefix loss at the trained length beyond NEAR times the best one is marked: such a row is of a variant that
    learns slower, and its place says nothing of length.
    """
    rows = pooled(results)
    longest, trained, columns = _contexts(rows)
    best = min((loss for row in rows if (loss := _prefix(row, trained)) is not None), default=None)
    head = (
        f"| variant | seeds | learning rate | {columns} | change to {longest:,} [95%] | gained up to {trained:,} [95%] "
    )
    lines = [
        f"{head}| remembered | prefix at {trained:,} |",
        "|---|---|---|" + "---|" * (len(rows[0]["same_target"]) + 4),
    ]
    for row in rows:
        gain = [found for found in row.get("gained_from_context") or () if found["to_context"] == trained]
        cells = [
            row["variant"],
            str(row["num_seeds"]),
            _rate(row),
            *(_number(same["nll"]) for same in row["same_target"]),
            _change(row),
            _with_interval(gain[0]["gain"], gain[0]["ci95"]) if gain else "-",
            _number((row.get("remembered_share") or {}).get("share"), ".0%"),
            _near(_prefix(row, trained), best),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recall_points(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"name", "family", "state_bytes", "accuracies", "mean", "ci95"}] of a task's runs, a point for each name.

    The accuracy of a run is that at the trained length, the mean over the rows of its grid (depths).
    """
    points = []
    for places in grouped([result["name"] for result in results], [result["seed"] for result in results]):
        runs = [results[place] for place in places]
        accuracies = [_accuracy(run) for run in runs]
        mean, ci95 = mean_and_interval(accuracies)
        ci95 = [None if end is None else min(max(end, 0.0), 1.0) for end in ci95]
        found = {"name": runs[0]["name"], "family": runs[0]["name"].partition(",")[0], "accuracies": accuracies}
        rate = {"learning_rate": runs[0].get("learning_rate"), "rates_tried": runs[0].get("rates_tried")}
        points.append(found | rate | {"state_bytes": runs[0]["state_bytes"], "mean": mean, "ci95": ci95})
    return points


def recall_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a point: bytes of state, percent of answers right, and that of each seed."""
    lines = ["| model | bytes of state | right [95% over seeds] | each seed | learning rate |", "|---|---|---|---|---|"]
    for point in recall_points(results):
        right = _with_interval(point["mean"], point["ci95"], ".1%")
        seeds = ", ".join(_number(accuracy, ".1%") for accuracy in point["accuracies"])
        lines.append(f"| {point['name']} | {_number(point['state_bytes'], ',')} | {right} | {seeds} | {_rate(point)} |")
    return "\n".join(lines) + "\n"


def _accuracy(result: Mapping[str, Any]) -> float | None:
    lengths = result["columns"]["values"]
    if result["train_length"] not in lengths:
        return None
    return mean_and_interval([row[lengths.index(result["train_length"])] for row in result["accuracy"]])[0]


def _contexts(results: Sequence[Mapping[str, Any]]) -> tuple[int, int, str]:
    """The longest context, the trained one, and the heads of the columns."""
    contexts = [row["context"] for row in results[0]["same_target"]]
    return contexts[-1], results[0]["same_target_change"]["from_context"], " | ".join(f"{c:,}" for c in contexts)


def _prefix(result: Mapping[str, Any], trained: int) -> float | None:
    return next(row["nll"] for row in result["lengths"] if row["length"] == trained)


def _near(loss: float | None, best: float | None) -> str:
    if loss is None or best is None or loss <= NEAR * best:
        return _number(loss)
    return f"{loss:.3f}, {loss / best - 1:.0%} above the best"


def _change(result: Mapping[str, Any]) -> str:
    change = result["same_target_change"]
    low, high = (_number(bound, "+.3f") for bound in change["ci95"][-1])
    return f"{_number(change['difference'][-1], '+.3f')} [{low}, {high}]"


def _rate(row: Mapping[str, Any]) -> str:
    """The learning rate that was chosen, and whether it is the end of those that were tried."""
    rate, tried = row.get("learning_rate"), row.get("rates_tried") or ()
    if rate is None:
        return "-"
    ends = {min(tried): "lowest", max(tried): "highest"} if len(tried) > 1 else {}
    return f"{rate:g} ({ends[rate]})" if rate in ends else f"{rate:g}"


def _with_interval(value: float | None, ci95: Sequence[float | None], form: str = ".3f") -> str:
    return _number(value, form) + ("" if None in ci95 else f" [{ci95[0]:{form}}, {ci95[1]:{form}}]")


def _number(value: float | None, form: str = ".3f") -> str:
    """A number of a table; a dash where it is not finite, which JSON keeps as null."""
    return "-" if value is None else f"{value:{form}}"
