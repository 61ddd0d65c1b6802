"""From the loss sums of documents at several contexts to means, changes and gains, each with its 95% interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sympow_jax.evals import bootstrap

CSV_HEADER = ("curve", "tokens", "nll", "low", "high")
SHORTEST = 16  # the training length over the context from which what is gained from context counts


def default_lengths(train_length: int, lengths: Sequence[int]) -> tuple[int, ...]:
    """The contexts of an evaluation that names none: `lengths`, and a 16th and a quarter of the training length.

    Below the trained context a curve shows whether the model uses what it reads at all.
    """
    return tuple(sorted({*lengths, max(1, train_length // SHORTEST), max(1, train_length // 4)}))


def summarise(
    arrays: Mapping[str, np.ndarray], *, train_length: int, window: int = 0, stride: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Means and 95% intervals from the per-document sums of the npz."""
    clusters, lengths, edges = arrays["clusters"], arrays["lengths"], arrays["bin_edges"]

    def mean(name: str):
        return bootstrap.mean_and_interval(arrays[f"{name}_sums"], arrays[f"{name}_counts"], clusters, seed=seed)

    def entries(name: str, label: str) -> list[dict[str, Any]]:
        tokens = arrays[f"{name}_counts"].sum(0)
        return [
            {label: int(length), "nll": float(nll), "ci95": ci.tolist(), "num_tokens": int(count)}
            for length, nll, ci, count in zip(lengths, *mean(name), tokens, strict=True)
        ]

    nll, ci95 = mean("bin")
    result = {
        "lengths": entries("length", "length"),
        "same_target": entries("same_target", "context"),
        "same_target_change": _change(arrays, train_length, seed),
        "gained_from_context": gained_from_context(arrays, train_length, seed=seed),
        "remembered_share": remembered_share(arrays, train_length, seed=seed),
        "contextwise": {
            "position": ((edges[:-1] + edges[1:] + 1) / 2).tolist(),  # mean number of inputs read, BOS included
            "nll": nll.tolist(),
            "ci95": ci95.tolist(),
        },
    }
    if window:
        nll, ci95 = mean("sliding")
        result["sliding_window"] = {
            "length": int(lengths[-1]),
            "window": window,
            "stride": stride,
            "nll": float(nll[0]),
            "ci95": ci95[0].tolist(),
            "num_tokens": int(arrays["sliding_counts"].sum()),
        }
    return result


def _change(arrays: Mapping[str, np.ndarray], train_length: int, seed: int) -> dict[str, Any]:
    """Same-target loss minus that at the training length (or the nearest shorter context), paired over documents."""
    contexts, reference = arrays["lengths"], _trained(arrays["lengths"], train_length)
    pair = (arrays["same_target_sums"], arrays["same_target_counts"])
    sums, counts = (np.repeat(array[:, reference : reference + 1], len(contexts), axis=1) for array in pair)
    difference, ci95 = bootstrap.difference_and_interval((sums, counts), pair, arrays["clusters"], seed=seed)
    return {
        "from_context": int(contexts[reference]),
        "context": contexts.tolist(),
        "difference": difference.tolist(),
        "ci95": ci95.tolist(),
    }


def _trained(contexts: np.ndarray, train_length: int) -> int:
    """The column of the training length, or of the nearest shorter context that was scored."""
    return max(int(np.searchsorted(contexts, train_length, side="right")) - 1, 0)


def csv_rows(result: Mapping[str, Any]) -> list[list[Any]]:
    """The curves of a result as a table: CSV_HEADER; tokens are those of the context or position, low and high the 95%
    interval."""
    rows = [["same_target", row["context"], row["nll"], *row["ci95"]] for row in result["same_target"]]
    rows += [["prefix", row["length"], row["nll"], *row["ci95"]] for row in result["lengths"]]
    table = result["contextwise"]
    columns = zip(table["position"], table["nll"], table["ci95"], strict=True)
    return rows + [["contextwise", position, nll, *ci95] for position, nll, ci95 in columns]


def gained_from_context(arrays: Mapping[str, np.ndarray], train_length: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """gained(a, b) with its paired interval, from training length / SHORTEST to it, and from it to the longest context.

    Where one was not scored, the nearest shorter one stands for it, or the shortest; of equal ends nothing is gained,
    and the entry is left out.
    """
    contexts = arrays["lengths"]
    short, trained, longest = _ends(contexts, train_length)
    sums, counts = arrays["same_target_sums"], arrays["same_target_counts"]
    found = []
    for a, b in ((short, trained), (trained, longest)):
        if a == b:
            continue
        before, after = ((sums[:, [n]], counts[:, [n]]) for n in (a, b))
        gain, ci95 = bootstrap.difference_and_interval(after, before, arrays["clusters"], seed=seed)
        ends = {"from_context": int(contexts[a]), "to_context": int(contexts[b])}
        found.append(ends | {"gain": float(gain[0]), "ci95": ci95[0].tolist()})
    return found


def _ends(contexts: np.ndarray, train_length: int) -> tuple[int, int, int]:
    """The columns of training length / SHORTEST, of the training length and of the longest context."""
    short = max(int(np.searchsorted(contexts, train_length // SHORTEST, side="right")) - 1, 0)
    return short, _trained(contexts, train_length), len(contexts) - 1


def remembered_share(arrays: Mapping[str, np.ndarray], train_length: int, *, seed: int = 0) -> dict[str, Any] | None:
    """What of the gain from context is still there at the longest context, with its interval over source documents.

    (L(short) - L(longest)) / (L(short) - L(trained)) of same-target losses L, with the ends of `gained_from_context`,
    `short` a 16th of the training length if that was scored: 1 keeps what it gained, more than 1 goes on gaining, 0
    predicts no better than with `short`, less than 0 worse. None where two of the three are one, and where the gain up
    to the training length may be 0: nothing was remembered.
    """
    ends = _ends(arrays["lengths"], train_length)
    gained = gained_from_context(arrays, train_length, seed=seed)
    if len(set(ends)) < 3 or not gained[0]["ci95"][0] > 0:
        return None
    columns = [arrays[f"same_target_{what}"][:, [end]] for end in ends for what in ("sums", "counts")]

    def share(*sums: np.ndarray) -> np.ndarray:
        short, trained, longest = (bootstrap.ratio(*sums[i : i + 2]) for i in (0, 2, 4))
        return bootstrap.ratio(short - longest, short - trained)

    ci95 = bootstrap.bootstrap_interval(tuple(columns), share, arrays["clusters"], seed=seed)
    value = share(*(np.sum(column, axis=0) for column in columns))
    return {"share": float(value[0]), "ci95": ci95[0].tolist()}
