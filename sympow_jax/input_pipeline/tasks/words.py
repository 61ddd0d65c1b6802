"""What tasks of words are written in: made-up words under a tokenizer of text, or one token id a word."""

import dataclasses
import functools
import itertools
from typing import Protocol, runtime_checkable

import numpy as np

from sympow_jax.input_pipeline.tokenizers import IdTokenizer, Tokenizer, load_tokenizer

IDS = "ids"  # in place of the name of a tokenizer: the ids of task.vocab_size
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NUM_MARKS = 8  # ids that stand for fixed text: 1 to 8; 0 is BOS and filler

_SYLLABLES = [c + v for c, v in itertools.product("bdfgklmnprstvz", "aeiou")]
NUM_TEXT_WORDS = len(_SYLLABLES) ** 3


@runtime_checkable
class Words(Protocol):
    """Words 0..num_words-1 as tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """That decodes them."""
        ...

    @property
    def num_words(self) -> int:
        """How many there are."""
        ...

    def encode(self, *parts: str | int) -> np.ndarray:
        """Fixed text as it stands, and words by number, with a space in front."""
        ...

    def filler(self, length: int) -> np.ndarray:
        """`length` tokens that say nothing."""
        ...


@dataclasses.dataclass(frozen=True)
class TextWords:
    """Words of three syllables, consonant and vowel, such as `bakilo`.

    Attributes:
      name: what load_tokenizer takes.
    """

    name: str = "byte"
    num_words = NUM_TEXT_WORDS

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the name."""
        return _load(self.name)

    def encode(self, *parts: str | int) -> np.ndarray:
        """See Words.encode."""
        text = "".join(part if isinstance(part, str) else f" {spell(part)}" for part in parts)
        return _encode(self.name, text) if len(parts) == 1 else np.asarray(self.tokenizer.encode(text), np.int64)

    def filler(self, length: int) -> np.ndarray:
        """Sentences about grass and sky, cut at token level."""
        sentences = _encode(self.name, FILLER)
        return np.tile(sentences, -(-length // len(sentences)))[:length]


@dataclasses.dataclass(frozen=True)
class IdWords:
    """One id a word and one a piece of fixed text, for models as small as those of MQAR.

    Attributes:
      vocab_size: V; fixed texts are 1..NUM_MARKS by the order of `marks`, words NUM_MARKS + 1 .. V - 1, filler 0.
      marks: the fixed texts of the task.
    """

    vocab_size: int
    marks: tuple[str, ...]

    def __post_init__(self):
        if self.num_words < 2:
            raise ValueError(
                f"vocab_size {self.vocab_size}: must be at least {NUM_MARKS + 3}, two words besides {NUM_MARKS} marks "
                "and the filler"
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """Numbers."""
        return IdTokenizer(self.vocab_size)

    @property
    def num_words(self) -> int:
        """Ids that are left."""
        return self.vocab_size - NUM_MARKS - 1

    def encode(self, *parts: str | int) -> np.ndarray:
        """See Words.encode."""
        return np.array([1 + self.marks.index(p) if isinstance(p, str) else NUM_MARKS + 1 + p for p in parts], np.int64)

    def filler(self, length: int) -> np.ndarray:
        """Zeros."""
        return np.zeros(length, np.int64)


def spell(word: int) -> str:
    """The word of a number."""
    base = len(_SYLLABLES)
    return "".join(_SYLLABLES[word // base**place % base] for place in range(3))


@functools.lru_cache(maxsize=4)
def _load(name: str) -> Tokenizer:
    return load_tokenizer(name)


@functools.lru_cache(maxsize=4096)
def _encode(name: str, text: str) -> np.ndarray:
    return np.asarray(_load(name).encode(text), np.int64)


def words_of(tokenizer: str, *, vocab_size: int, marks: tuple[str, ...]) -> Words:
    """Words under a tokenizer: "ids", or the folder of a run on ids, has one id a word."""
    if tokenizer == IDS:
        return IdWords(vocab_size, marks)
    if isinstance(_load(tokenizer), IdTokenizer):
        return IdWords(_load(tokenizer).vocab_size, marks)
    return TextWords(tokenizer)
