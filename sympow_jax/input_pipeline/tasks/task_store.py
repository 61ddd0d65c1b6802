"""Synthetic tasks as training data: `data.train = "mqar"` reads a store whose rows are made when they are read."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from sympow_jax.config import TaskConfig
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.copying import Copy, SelectiveCopy
from sympow_jax.input_pipeline.tasks.memory import ForgettingRecall, StackRecall
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.input_pipeline.tasks.passkey import RANDOM_DEPTH, Passkey
from sympow_jax.input_pipeline.tasks.ruler import CommonWords, FrequentWords, MultiKey, VariableTracking, WordTask
from sympow_jax.input_pipeline.tasks.state_tracking import WordProblem
from sympow_jax.input_pipeline.tasks.synthetic import Batch, Task
from sympow_jax.input_pipeline.tokenizers import IdTokenizer, Tokenizer, load_tokenizer

HELDOUT_SEED = 1 << 41  # added to the seed of held-out examples; training seeds are far below
NUM_EXAMPLES = 1 << 24  # then they repeat
_BLOCK = 64  # examples made together


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a task by its name.

    Attributes:
      make: the task at a length, of what settings belong to it, with its answer at a depth (where it has one).
      axis: what a grid varies besides lengths: "pairs" (settings.num_pairs), "depths" or "".
      label: of that axis.
      num_examples: of a cell of the grid, unless others are asked for.
      of_words: written by a tokenizer.
    """

    make: Callable[[int, TaskConfig, float], Task]
    axis: str
    label: str
    num_examples: int = 64
    of_words: bool = False


def _group(name: str) -> Kind:
    return Kind(lambda T, s, depth: WordProblem(T, name.format(modulus=s.modulus)), "", "group")


def _words(make: Callable[..., Task], axis: str, label: str) -> Kind:
    """`make` takes settings, depth, and what every task of words takes."""

    def at_length(seq_len: int, s: TaskConfig, depth: float) -> Task:
        return make(s, depth, seq_len=seq_len, tokenizer=s.tokenizer, id_vocab=s.vocab_size)

    return Kind(at_length, axis, label, 32, of_words=True)


KINDS: dict[str, Kind] = {
    "mqar": Kind(
        lambda T, s, depth: MQAR(T, s.num_pairs, s.vocab_size, s.power, s.random_filler, s.num_passes),
        "pairs",
        "pairs",
        256,
    ),
    "copy": Kind(lambda T, s, depth: Copy(T, s.vocab_size), "", "tokens to remember"),
    "selective_copy": Kind(
        lambda T, s, depth: SelectiveCopy(T, s.num_pairs, s.vocab_size), "pairs", "tokens to remember"
    ),
    "passkey": Kind(lambda T, s, depth: Passkey(T, s.tokenizer, depth), "depths", "depth", 32, True),
    "stack_recall": Kind(lambda T, s, depth: StackRecall(T, s.num_pairs, s.vocab_size), "pairs", "deepest stack"),
    "forgetting_recall": Kind(lambda T, s, depth: ForgettingRecall(T, s.num_pairs, s.vocab_size), "pairs", "keys"),
    "parity": _group("Z2"),
    "modular_counting": _group("Z{modulus}"),
    "s5": _group("S5"),
    "multi_key": _words(lambda s, d, **how: MultiKey(num_keys=s.num_pairs, depth=d, **how), "depths", "depth"),
    "variable_tracking": _words(
        lambda s, d, **how: VariableTracking(num_chains=s.num_pairs, num_hops=s.num_hops, **how), "pairs", "chains"
    ),
    "common_words": _words(
        lambda s, d, **how: CommonWords(num_common=s.num_pairs, repeats=s.word_repeats, **how), "pairs", "common words"
    ),
    "frequent_words": _words(lambda s, d, **how: FrequentWords(**how), "", "frequent words"),
}


def make_task(name: str, seq_len: int, settings: TaskConfig, *, depth: float = RANDOM_DEPTH) -> Task:
    """The task `name` at a length; of `settings` it takes what belongs to it.

    Raises:
      TooShortError: a length that cannot hold what the settings ask for.
      ValueError: an unknown name, or values that the task cannot take.
    """
    if name not in KINDS:
        raise ValueError(f"task {name!r}: give one of {', '.join(KINDS)}")
    return KINDS[name].make(seq_len, settings, depth)


def _tokenizer(task: Task) -> Tokenizer:
    if isinstance(task, WordTask):
        return task.words.tokenizer
    return load_tokenizer(task.tokenizer) if isinstance(task, Passkey) else IdTokenizer(task.vocab_size)


class TaskStore(Store):
    """Row n is example n of a task: a pure function of (task, seed, n).

    Batches of it have `loss_mask`, 1 on the positions whose answer is asked for. `read` gives the inputs.
    """

    def __init__(self, name: str, task: Task, *, seed: int) -> None:
        self.address = name
        self.digest = f"{task!r} seed {seed}"
        self.vocab_size = task.vocab_size
        self.num_documents, self.document_length = NUM_EXAMPLES, task.seq_len
        self.chunks = (1 << 14, task.seq_len)
        self.tokenizer = _tokenizer(task)
        self.bos_id = self.tokenizer.bos_id

        @functools.lru_cache(maxsize=16)
        def block(number: int) -> Batch:
            return task.batch(seed, number, _BLOCK)

        self._block = block

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """Each example is its own."""
        return np.arange(self.num_documents)

    def documents(self, row: int) -> list[int]:
        """The number of the example."""
        return [row]

    def examples(self, rows: slice, columns: slice) -> Batch:
        """inputs, targets, loss_mask of examples `rows`; see Task.batch."""
        numbers = range(rows.start // _BLOCK, (rows.stop - 1) // _BLOCK + 1)
        blocks = [self._block(number) for number in numbers]
        inside = slice(rows.start - numbers.start * _BLOCK, rows.stop - numbers.start * _BLOCK)
        return {name: np.concatenate([block[name] for block in blocks])[inside, columns] for name in blocks[0]}

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        return self.examples(rows, columns)["inputs"]


def task_store(name: str, split: str, *, seq_len: int, settings: TaskConfig, seed: int) -> TaskStore:
    """The examples of a task; those of split "heldout" have seeds of their own."""
    return TaskStore(name, make_task(name, seq_len, settings), seed=seed + (HELDOUT_SEED if split == "heldout" else 0))
