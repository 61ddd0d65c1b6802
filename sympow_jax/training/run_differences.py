"""What differs between two finished runs."""

import pathlib
from typing import Any

import numpy as np

from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import flatten, unflatten
from sympow_jax.training.metrics import METRICS_NAME, read_metrics

TIMINGS = frozenset(
    (
        "tokens_per_sec",
        "tokens_per_sec_per_device",
        "mfu",
        "data_wait_fraction",
        "checkpoint_fraction",
        "compute_fraction",
        "save_stall_seconds",
        "restore_seconds",
        "lost_steps",
    )
)
_LOSSES = ("loss", "heldout_loss")


def read_arrays(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict[str, np.ndarray]]:
    """(step, arrays by name) of a checkpoint, by default the newest, on the host.

    Raises:
      CheckpointError: it is not sound.
    """
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        step = max(checkpointer.steps(), default=-1) if step is None else step
        specs, _ = checkpointer.describe(step)
        tree = checkpointer.restore(step, like=unflatten(specs)).tree
    return step, {name: np.asarray(array) for name, array in flatten(tree).items()}


def read_untimed_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the timings."""
    rows = read_metrics(pathlib.Path(workdir) / METRICS_NAME)
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def differences(first: str | pathlib.Path, second: str | pathlib.Path) -> list[str]:
    """What differs between two finished runs: step, arrays bit for bit, metrics but timings; one line each."""
    (step_a, a), (step_b, b) = read_arrays(first), read_arrays(second)
    found = [] if step_a == step_b else [f"last step: {step_a} and {step_b}"]
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append(f"{name}: only in one of them")
        elif a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
            found.append(f"{name}: different bits")
    rows_a, rows_b = read_untimed_metrics(first), read_untimed_metrics(second)
    if len(rows_a) != len(rows_b):
        found.append(f"{METRICS_NAME}: {len(rows_a)} and {len(rows_b)} rows")
    unequal = [(one, two) for one, two in zip(rows_a, rows_b, strict=False) if one != two]
    return found + [f"{METRICS_NAME}: {one} and {two}" for one, two in unequal[:3]]


def largest_difference(first: str | pathlib.Path, second: str | pathlib.Path) -> float:
    """Of the finite losses of two finished runs, held-out ones too, relative; infinite where one has more of them."""
    a, b = _finite_losses(first), _finite_losses(second)
    return max(abs(b[key] / a[key] - 1) for key in a) if a.keys() == b.keys() else float("inf")


def _finite_losses(workdir: str | pathlib.Path) -> dict[tuple[str, int], float]:
    """By name and step; metrics have None for the others."""
    rows = read_untimed_metrics(workdir)
    return {(name, row["step"]): row[name] for row in rows for name in _LOSSES if row.get(name) is not None}
