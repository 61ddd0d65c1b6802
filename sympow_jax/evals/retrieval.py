"""Tasks by exact token match: recall, copying, state tracking and needles over lengths and numbers of pairs or depths.

An example counts as solved when the most likely token is right at every position that its loss_mask asks for. With
the true answer as input this is what greedy decoding would print, so one pass over the example decides.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import TaskConfig
from sympow_jax.evals import bootstrap
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.passkey import RANDOM_DEPTH, Needle
from sympow_jax.input_pipeline.tasks.synthetic import Task, TooShortError
from sympow_jax.input_pipeline.tasks.task_store import KINDS, make_task

EVALUATION_SEED = 1 << 40  # added to the seed, far from any training seed
_LOGITS_AT_ONCE = 1 << 25


@runtime_checkable
class LogitModel(Protocol):
    """What retrieval needs of a model; see sympow_jax.models."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that calls are spread over; None is one."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""
        ...

    @property
    def depends_on_length(self) -> bool:
        """Whether `length`, the longest context of the stream, changes the result."""
        ...

    @property
    def streams(self) -> bool:
        """Whether it reads a sequence in parts; one that does not reads each whole."""
        ...

    def initial_state(self, batch_size: int, max_length: int) -> Any:
        """The state before the first token."""
        ...

    def logits(self, params, inputs, *, state=None, length=0) -> tuple[jax.Array, Any]:
        """Next-token logits [B, T, V], and the state after the last token."""
        ...


class Matcher:
    """Counts right answers; documents longer than `chunk_size` are streamed, and logits made only at answers.

    On a mesh rows lie over data and fsdp, padded to what divides, and what is right comes to every device. A process
    makes all of a batch but reads only the documents of the rows that it holds (`held`).
    """

    def __init__(self, model: LogitModel, params: Any, *, chunk_size: int = 512):
        self.chunk_size, self._model, self._params = chunk_size, model, params
        self._mesh, whole = model.mesh, sharding.everywhere(model.mesh)

        @functools.partial(jax.jit, static_argnames="length")
        def advance(params, inputs, state, length):
            return model.logits(params, inputs, state=state, length=length)[1]

        @functools.partial(jax.jit, static_argnames="length", out_shardings=(whole, None))
        def compare(params, inputs, targets, state, length):
            logits, state = model.logits(params, inputs, state=state, length=length)
            return jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets, state

        self._advance, self._compare = advance, compare

    def held(self, num_rows: int) -> np.ndarray:
        """Which of so many examples of a batch this process must have whole, [num_rows] bool."""
        return sharding.held_rows(self._mesh, num_rows)

    def right(self, inputs: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Whether each asked-for target [b, T] is the most likely token; False where nothing is asked."""
        batch, length = inputs.shape
        context = length if self._model.depends_on_length else 0
        streamed = length > self.chunk_size and self._model.streams
        num_blocks, _ = sharding.shard_counts(self._mesh)
        padding = ((0, -batch % num_blocks), (0, -length % self.chunk_size if streamed else 0))
        inputs, targets = np.pad(inputs, padding), np.pad(targets, padding)
        place = functools.partial(sharding.place_rows, self._mesh)
        if not streamed:
            hits, _ = self._compare(self._params, place(inputs), place(targets), None, length=context)
            return np.asarray(hits)[:batch] & asked
        state = self._model.initial_state(*inputs.shape)
        right = np.zeros(asked.shape, bool)
        for start in range(0, length, self.chunk_size):
            columns = slice(start, start + self.chunk_size)
            block, wanted = place(inputs[:, columns]), asked[:, columns]
            if wanted.any():
                hits, state = self._compare(self._params, block, place(targets[:, columns]), state, length=context)
                right[:, columns] = np.asarray(hits)[:batch, : wanted.shape[1]] & wanted
            else:
                state = self._advance(self._params, block, state, length=context)
                jax.block_until_ready(state)  # a backend holds a bounded number of programs that wait for each other
        return right

    def counts(self, task: Task, *, num_examples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Right answers and questions of each example, both [num_examples].

        Raises:
          ValueError: the task has tokens that the model does not have.
        """
        known = self._model.vocab_size
        if task.vocab_size > known:
            raise ValueError(f"vocab_size {known}: of the model, is less than the {task.vocab_size} of the task")
        width = min(task.seq_len, self.chunk_size)
        batch = int(np.clip(_LOGITS_AT_ONCE // (width * task.vocab_size), 1, min(num_examples, 64)))
        right, asked = [], []
        for step in range(-(-num_examples // batch)):
            examples = task.batch(EVALUATION_SEED + seed, step, batch)
            mask = examples["loss_mask"] > 0
            right.append(self.right(examples["inputs"], examples["targets"], mask).sum(axis=1))
            asked.append(mask.sum(axis=1))
        return np.concatenate(right)[:num_examples], np.concatenate(asked)[:num_examples]


Grid = tuple[dict[str, Any], dict[str, np.ndarray]]


def accuracy_grid(
    matcher: Matcher,
    make: Callable[[int, Any], Task],
    *,
    lengths: Sequence[int],
    rows: tuple[str, Sequence[Any]],
    num_examples: int,
    train_length: int = 0,
    seed: int = 0,
) -> Grid:
    """Accuracies of the tasks `make(length, row)` over a grid; a cell of which it raises TooShortError has no task.

    Returns:
      What goes into eval/<name>.json: {"columns": {"name", "values"}, "rows": {"name", "values"}, "accuracy":
      [rows, columns], mean over answer tokens, "ci95": bootstrap over examples, "solved": fraction of the examples that
      ask for anything with every token right, "num_examples", "train_length"}, None in cells without a task; and into
      eval/<name>.npz: right answers and questions of each example, [rows, columns, num_examples], 0 in cells without
      a task.

    Raises:
      TooShortError: there is no cell with a task.
    """
    grid: dict[str, list] = {"accuracy": [], "ci95": [], "solved": []}
    shape = (len(rows[1]), len(lengths), num_examples)
    arrays = {"right": np.zeros(shape, np.int32), "asked": np.zeros(shape, np.int32)}
    too_short = None
    for i, row in enumerate(rows[1]):
        for line in grid.values():
            line.append([None] * len(lengths))
        for j, length in enumerate(lengths):
            try:
                right, asked = matcher.counts(make(length, row), num_examples=num_examples, seed=seed)
            except TooShortError as error:
                too_short = error
                continue
            arrays["right"][i, j], arrays["asked"][i, j] = right, asked
            for name, value in _summary(right, asked, seed).items():
                grid[name][i][j] = value
    if too_short and not arrays["asked"].any():
        raise too_short
    result = {
        "columns": {"name": "length (tokens)", "values": list(lengths)},
        "rows": {"name": rows[0], "values": list(rows[1])},
        **grid,
        "num_examples": num_examples,
        "train_length": train_length,
    }
    return result, arrays


def _summary(right: np.ndarray, asked: np.ndarray, seed: int) -> dict[str, Any]:
    mean, ci95 = bootstrap.mean_and_interval(right[:, None], asked[:, None], np.arange(len(right)), seed=seed)
    solved = (right == asked)[asked > 0]  # that an example asks for nothing does not solve it
    return {"accuracy": float(mean[0]), "ci95": ci95[0].tolist(), "solved": float(solved.mean())}


def task_grid(
    matcher: Matcher,
    task: str,
    settings: TaskConfig,
    *,
    lengths: Sequence[int],
    pairs: Sequence[int] = (),
    depths: Sequence[float] = (),
    haystack: Store | None = None,
    **options: Any,
) -> Grid:
    """Accuracy over length x pairs, x depth, or length alone; see accuracy_grid.

    Args:
      matcher: of the model.
      task: a name of KINDS, or "needle", which hides in documents of `haystack`.
      settings: with the vocabulary and the tokenizer of the model.
      lengths: the columns.
      pairs: the rows of a task that has them.
      depths: likewise.
      haystack: of "needle".
      options: num_examples, train_length and seed of accuracy_grid.
    """
    if haystack is not None:
        return accuracy_grid(
            matcher,
            lambda length, depth: Needle(length, haystack, depth=depth, held=matcher.held),
            lengths=lengths,
            rows=("depth", depths),
            **options,
        )
    kind = KINDS[task]
    rows: dict[str, Sequence[Any]] = {"pairs": pairs, "depths": depths, "": ("all",)}

    def make(length: int, row: Any) -> Task:
        own = dataclasses.replace(settings, num_pairs=row) if kind.axis == "pairs" else settings
        return make_task(task, length, own, depth=row if kind.axis == "depths" else RANDOM_DEPTH)

    return accuracy_grid(matcher, make, lengths=lengths, rows=(kind.label, rows[kind.axis]), **options)
