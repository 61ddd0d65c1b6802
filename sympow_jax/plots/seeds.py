"""Runs that differ in their seed alone, drawn and tabled as one: means over seeds, with the interval over seeds."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np


def grouped(keys: Sequence[Hashable], seeds: Sequence[Any]) -> list[list[int]]:
    """Places of equal keys, in the order in which they first occur; a seed that is there again begins a group anew."""
    places: dict[Hashable, list[int]] = {}
    pairs = list(zip(keys, seeds, strict=True))
    for place, pair in enumerate(pairs):
        places.setdefault((pair[0], pairs[:place].count(pair)), []).append(place)
    return list(places.values())


def comparable(result: Mapping[str, Any]) -> Hashable:
    """What the length-generalisation results of several seeds share: one variant, asked the same of the same text."""
    contexts = tuple(row["context"] for row in result["same_target"])
    asked = (result["train_length"], result.get("num_targets"), contexts, tuple(result["contextwise"]["position"]))
    overrides = str(sorted((result.get("position_overrides") or {}).items(), key=str))
    return (str(result.get("variant")), result.get("step"), overrides, str(result["data"]["digest"]), *asked)


def mean_and_interval(values: Sequence[float | None]) -> tuple[float | None, list[float | None]]:
    """mean +- t s / sqrt(n), Student's 95% interval of the mean of n seeds; null where a value is, or n is 1."""
    if None in values:
        return None, [None, None]
    numbers = np.asarray(values, float)
    mean, n = float(numbers.mean()), len(numbers)
    if n < 2:
        return mean, [None, None]
    from scipy import special  # slow to import

    half = float(special.stdtrit(n - 1, 0.975) * numbers.std(ddof=1) / np.sqrt(n))
    return mean, [mean - half, mean + half]


def over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`comparable` results as one of the same shape, with "num_seeds".

    Every value is the mean over the seeds and every "ci95" Student's interval of that mean. The documents are the same
    for all seeds: what another choice of them would change is not in it. A single result stays what it is, with
    its intervals over documents. As there, no share is remembered of a gain that may be 0.
    """
    first = results[0]
    if len(results) == 1:
        return {**first, "num_seeds": 1}

    def entry(pick: Callable[[Mapping[str, Any]], Mapping[str, Any]], value: str) -> dict[str, Any]:
        mean, ci95 = mean_and_interval([pick(result)[value] for result in results])
        return {**pick(first), value: mean, "ci95": ci95}

    def rows(name: str, value: str) -> list[dict[str, Any]]:
        return [entry(lambda result, i=i: result[name][i], value) for i in range(len(first[name]))]

    def columns(name: str, value: str) -> dict[str, Any]:
        pairs = [mean_and_interval(values) for values in zip(*(r[name][value] for r in results), strict=True)]
        return {**first[name], value: [mean for mean, _ in pairs], "ci95": [ci95 for _, ci95 in pairs]}

    pooled = {
        **first,
        "seed": None,
        "num_seeds": len(results),
        "lengths": rows("lengths", "nll"),
        "same_target": rows("same_target", "nll"),
        "same_target_change": columns("same_target_change", "difference"),
        "contextwise": columns("contextwise", "nll"),
    }
    if all(result.get("gained_from_context") for result in results):
        pooled["gained_from_context"] = rows("gained_from_context", "gain")
    else:
        pooled.pop("gained_from_context", None)
    gained = pooled.get("gained_from_context")
    low = gained[0]["ci95"][0] if gained else None
    if low is not None and low > 0 and all(result.get("remembered_share") for result in results):
        pooled["remembered_share"] = entry(lambda result: result["remembered_share"], "share")
    else:
        pooled.pop("remembered_share", None)
    return pooled
