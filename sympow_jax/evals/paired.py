"""Differences between two runs evaluated on the same documents, from their npz files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sympow_jax.evals.bootstrap import difference_and_interval


def mean_of_seeds(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a run whose loss on each document is the mean of those of `runs`, which scored the same ones."""
    first = dict(runs[0])
    if any(not np.array_equal(run["document_ids"], first["document_ids"]) for run in runs):
        raise ValueError("document_ids: its seeds scored different documents; evaluate them with one --num_documents")
    sums = [name for name in first if name.endswith("_sums")]
    return first | {name: np.mean([run[name] for run in runs], axis=0) for name in sums}


def paired_difference(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
    """Loss of `second` minus loss of `first` in nats per token, with 95% intervals of the paired differences.

    Args:
      first, second: arrays of two eval/<name>.npz (`read_npz`) over the same store.
      seed: of the bootstrap over source documents.

    Returns:
      {"num_documents", "lengths": [{"length", "difference", "ci95"}], "same_target": [{"context", ...}],
      "contextwise": {"position", "difference", "ci95"}}, for the lengths that both have; same_target is empty
      when the runs scored different targets, contextwise when their bins differ.

    Raises:
      ValueError: the files come from different stores or share no document.
    """
    if str(first["digest"]) != str(second["digest"]):
        raise ValueError(
            f"digest: the evaluations used different stores, {first['digest']} and {second['digest']}; "
            "evaluate both runs on one store with --data"
        )
    ids, rows_1, rows_2 = np.intersect1d(first["document_ids"], second["document_ids"], return_indices=True)
    if not len(ids):
        raise ValueError("document_ids: the evaluations share no document; evaluate both with the same seed")
    lengths, columns_1, columns_2 = np.intersect1d(first["lengths"], second["lengths"], return_indices=True)

    def difference(name: str, pick_1: Any, pick_2: Any) -> tuple[np.ndarray, np.ndarray]:
        def side(arrays: Mapping[str, np.ndarray], rows: Any, pick: Any) -> tuple[np.ndarray, np.ndarray]:
            return arrays[f"{name}_sums"][rows][:, pick], arrays[f"{name}_counts"][rows][:, pick]

        sides = side(first, rows_1, pick_1), side(second, rows_2, pick_2)
        return difference_and_interval(*sides, first["clusters"][rows_1], seed=seed)

    def entries(name: str, label: str) -> list[dict[str, Any]]:
        values, intervals = difference(name, columns_1, columns_2)
        return [
            {label: int(length), "difference": float(value), "ci95": interval.tolist()}
            for length, value, interval in zip(lengths, values, intervals, strict=True)
        ]

    result: dict[str, Any] = {"num_documents": len(ids), "same_target": [], "contextwise": {}}
    result["lengths"] = entries("length", "length") if len(lengths) else []
    same_targets = first["lengths"][-1] == second["lengths"][-1] and first["num_targets"] == second["num_targets"]
    if same_targets:
        result["same_target"] = entries("same_target", "context")
    edges = first["bin_edges"]
    if np.array_equal(edges, second["bin_edges"]):
        values, intervals = difference("bin", slice(None), slice(None))
        result["contextwise"] = {
            "position": ((edges[:-1] + edges[1:] + 1) / 2).tolist(),
            "difference": values.tolist(),
            "ci95": intervals.tolist(),
        }
    return result
