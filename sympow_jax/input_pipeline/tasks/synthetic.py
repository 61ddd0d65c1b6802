"""What synthetic tasks share: batches that are a pure function of (seed, step), made when they are asked for.

A task is a frozen dataclass with `seq_len`, `vocab_size` and `batch(seed, step, batch_size)`; `task_store` makes
training data of one.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Task(Protocol):
    """A generator of examples."""

    @property
    def seq_len(self) -> int:
        """Length T of inputs and targets."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the token alphabet."""
        ...

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """inputs, targets [b, T] int32 and loss_mask [b, T] float32, which is 1 where the answer is asked for."""
        ...


def uniform(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) float64 from a counter-based generator, the same on every machine and numpy version."""
    bits = np.random.Philox(key=[seed, step]).random_raw(int(np.prod(shape)))
    return (bits >> np.uint64(11)).reshape(shape) * 2.0**-53


def choose_distinct(random: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct numbers of 0..n-1 for each row of random numbers [b, n], in random order -> [b, count]."""
    chosen = np.argpartition(random, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(random, chosen, axis=1), axis=1)
    return np.take_along_axis(chosen, order, axis=1)


def as_batch(inputs: np.ndarray, targets: np.ndarray, loss_mask: np.ndarray) -> Batch:
    """The dtypes that a training step expects."""
    return {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_mask": loss_mask.astype(np.float32),
    }


class TooShortError(ValueError):
    """A seq_len that cannot hold what the settings ask for: a cell of a grid without a task."""


def row_stream(seed: int, step: int, row: int) -> Callable[[int], np.ndarray]:
    """`draw(n)`: the next n numbers in [0, 1) of one row, for tasks whose rows need different numbers of them."""
    generator = np.random.Philox(key=[seed, step], counter=[0, 0, row, 1])
    return lambda n: (generator.random_raw(n) >> np.uint64(11)) * 2.0**-53


def draw_distinct(random: np.ndarray, count: int) -> list[int]:
    """Distinct numbers of 0..count-1 in random order, one for each of `random` [n], in O(n): a shuffle that stops."""
    moved: dict[int, int] = {}
    drawn = []
    for i, u in enumerate(random.tolist()):
        j = i + int(u * (count - i))
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn
