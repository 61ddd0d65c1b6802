"""Synthetic tasks as training data: `data.train = "mqar"` reads a store whose rows are made when they are read."""

import functools

import numpy as np

from sympow_jax.config import TASKS, TaskConfig
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.copying import Copy, SelectiveCopy
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.input_pipeline.tasks.passkey import Passkey
from sympow_jax.input_pipeline.tasks.synthetic import Batch, Task
from sympow_jax.input_pipeline.tokenizers import IdTokenizer, Tokenizer, load_tokenizer

HELDOUT_SEED = 1 << 41  # added to the seed of held-out examples; training seeds are far below
NUM_EXAMPLES = 1 << 24  # then they repeat
_BLOCK = 64  # examples made together


def make_task(name: str, seq_len: int, settings: TaskConfig) -> Task:
    """The task `name` at a length; of `settings` it takes what belongs to it.

    Raises:
      ValueError: an unknown name, or values that the task cannot take.
    """
    if name == "mqar":
        return MQAR(
            seq_len,
            num_pairs=settings.num_pairs,
            vocab_size=settings.vocab_size,
            power=settings.power,
            random_filler=settings.random_filler,
            num_passes=settings.num_passes,
        )
    if name == "copy":
        return Copy(seq_len, vocab_size=settings.vocab_size)
    if name == "selective_copy":
        return SelectiveCopy(seq_len, num_content=settings.num_pairs, vocab_size=settings.vocab_size)
    if name == "passkey":
        return Passkey(seq_len, tokenizer=settings.tokenizer)
    raise ValueError(f"task {name!r}: give one of {', '.join(TASKS)}")


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
        self.tokenizer: Tokenizer = (
            load_tokenizer(task.tokenizer) if isinstance(task, Passkey) else IdTokenizer(task.vocab_size)
        )
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
