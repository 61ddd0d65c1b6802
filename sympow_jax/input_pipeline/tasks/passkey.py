"""Passkey and needle in a haystack: one fact in a long text, asked for at the end.

Passkey hides a number in repeated sentences (Mohtashami and Jaggi 2023, arXiv 2305.16300); Needle hides one in real
documents. Both are exactly `seq_len` tokens long under any tokenizer: the pieces are encoded one by one and the filler
is cut at token level. Answers are a space and five digits, and only their tokens are asked for.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.synthetic import Batch, TooShortError, as_batch, uniform
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer

RANDOM_DEPTH = -1.0
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
PASSKEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"
NEEDLE = "\nThe magic number of {word} is {key}.\n"
NEEDLE_QUESTION = "\nThe magic number of {word} is"
WORDS = [
    "amber",
    "basil",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "ivory",
    "jewel",
    "kayak",
    "lemon",
    "maple",
    "north",
    "olive",
    "pearl",
]


@dataclasses.dataclass(frozen=True)
class Passkey:
    """A task of `input_pipeline.synthetic`.

    Attributes:
      seq_len: length of inputs and targets, in tokens.
      tokenizer: what load_tokenizer takes; the byte tokenizer needs no files.
      depth: where the key stands in the filler, from 0 (first) to 1 (last); -1 draws it uniformly.
    """

    seq_len: int
    tokenizer: str = "byte"
    depth: float = RANDOM_DEPTH

    def __post_init__(self):
        self.batch(0, 0, 1)  # a length that is too short is known before anything is written

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return _tokenizer(self.tokenizer).vocab_size

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        encode = _tokenizer(self.tokenizer).encode
        garbage = np.asarray(encode(GARBAGE))

        def filler(row: int, length: int) -> np.ndarray:
            return np.tile(garbage, -(-length // len(garbage)))[:length]

        pieces = (TASK, PASSKEY, PASSKEY_QUESTION)
        return _assemble(self, _tokenizer(self.tokenizer), pieces, filler, seed, step, batch_size)


@dataclasses.dataclass(frozen=True)
class Needle:
    """One sentence hidden in a document of a store, asked for by repeating its beginning.

    Attributes:
      seq_len: length of inputs and targets, in tokens.
      store: its documents, of at least seq_len tokens each, are the haystack.
      depth: as for Passkey.
      held: of so many rows, which have a document; the others have zeros in its place. None: all.
    """

    seq_len: int
    store: Store
    depth: float = RANDOM_DEPTH
    held: Callable[[int], np.ndarray] | None = None

    @property
    def vocab_size(self) -> int:
        """That of the store."""
        return self.store.vocab_size

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        if self.seq_len > self.store.document_length:
            raise ValueError(
                f"seq_len {self.seq_len}: exceeds the {self.store.document_length} tokens of the haystack's documents"
            )
        rows = (uniform(seed, 2 * step, (batch_size,)) * self.store.num_documents).astype(int).tolist()
        held = np.ones(batch_size, bool) if self.held is None else self.held(batch_size)

        def filler(row: int, length: int) -> np.ndarray:
            if not held[row]:
                return np.zeros(length, int)
            return np.asarray(self.store.read(slice(rows[row], rows[row] + 1), slice(0, length)))[0]

        return _assemble(self, self.store.tokenizer, ("", NEEDLE, NEEDLE_QUESTION), filler, seed, step, batch_size)


@functools.lru_cache(maxsize=4)
def _tokenizer(spec: str) -> Tokenizer:
    return load_tokenizer(spec)


def _assemble(
    task: Passkey | Needle,
    tokenizer: Tokenizer,
    pieces: tuple[str, str, str],
    filler: Callable[[int, int], np.ndarray],
    seed: int,
    step: int,
    batch_size: int,
) -> Batch:
    """opening, filler with the fact inside, question, answer: seq_len targets; inputs are shifted, BOS in front."""
    opening, fact, question = pieces
    random = uniform(seed, 2 * step + 1, (batch_size, 3))
    targets = np.zeros((batch_size, task.seq_len), np.int64)
    loss_mask = np.zeros((batch_size, task.seq_len))
    for row, (for_key, for_word, for_depth) in enumerate(random):
        names = {"key": 10_000 + int(for_key * 90_000), "word": WORDS[int(for_word * len(WORDS))]}
        depth = for_depth if task.depth < 0 else task.depth
        head, middle, tail, answer = (
            np.asarray(tokenizer.encode(text), np.int64)
            for text in (opening, fact.format(**names), question.format(**names), " {key}".format(**names))
        )
        room = task.seq_len - sum(map(len, (head, middle, tail, answer)))
        if room < 0:
            raise TooShortError(f"seq_len {task.seq_len}: too short for the text around the fact; add {-room} tokens")
        hay, place = np.asarray(filler(row, room), np.int64), round(depth * room)
        targets[row] = np.concatenate([head, hay[:place], middle, hay[place:], tail, answer])
        loss_mask[row, task.seq_len - len(answer) :] = 1.0
    inputs = np.concatenate([np.full((batch_size, 1), tokenizer.bos_id), targets[:, :-1]], axis=1)
    return as_batch(inputs, targets, loss_mask)
