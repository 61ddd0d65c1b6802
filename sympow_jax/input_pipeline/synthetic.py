"""Synthetic tasks as data: batches that are a pure function of (seed, step), made when they are asked for.

A task is a frozen dataclass with `seq_len`, `vocab_size` and `batch(seed, step, batch_size)`; a run names one as
"NAME:field=value,..." (`make_task`), for example "mqar:num_pairs=8,vocab_size=512".
"""

import dataclasses
import difflib
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


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


@dataclasses.dataclass(frozen=True)
class SyntheticBatches:
    """A BatchSource: `source[step]` is this host's part of global batch `step`."""

    task: Task
    seed: int
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise ValueError(f"batch_size {self.batch_size}: must be a multiple of the {self.process_count} processes")

    @property
    def vocab_size(self) -> int:
        """Size of the token alphabet."""
        return self.task.vocab_size

    def __getitem__(self, step: int) -> Batch:
        size = self.batch_size // self.process_count
        rows = slice(self.process_index * size, (self.process_index + 1) * size)
        return {name: array[rows] for name, array in self.task.batch(self.seed, step, self.batch_size).items()}

    def describe(self, step: int) -> list[dict[str, Any]]:
        """What made each sequence of this host's part."""
        size = self.batch_size // self.process_count
        first = self.process_index * size
        return [{"task": repr(self.task), "seed": self.seed, "step": step, "row": first + row} for row in range(size)]

    def epoch(self, step: int) -> float:
        """0: examples do not repeat."""
        return 0.0


def make_task(spec: str, seq_len: int) -> Task:
    """The task that a specification names.

    Args:
      spec: "NAME" or "NAME:field=value,field=value"; fields are those of the task's dataclass.
      seq_len: length of inputs and targets.

    Raises:
      ValueError: an unknown name or field, or a value that the task cannot take.
    """
    from sympow_jax.input_pipeline import copying, mqar, passkey

    kinds = {
        "mqar": mqar.MQAR,
        "copy": copying.Copy,
        "selective_copy": copying.SelectiveCopy,
        "passkey": passkey.Passkey,
    }
    name, _, text = spec.partition(":")
    kind = kinds[_known("task", name, kinds)]
    fields = {field.name: type(field.default) for field in dataclasses.fields(kind) if field.name != "seq_len"}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        values[key] = _parse(key, value, fields[_known(f"field of {name}", key, fields)])
    return kind(seq_len=seq_len, **values)


def _known(what: str, name: str, names: Any) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what} {name!r}: give one of {', '.join(names)}{hint}")


def _parse(key: str, value: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"{key} = {value!r}: must be {kind.__name__}") from None
