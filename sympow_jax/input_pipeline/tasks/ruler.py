"""Tracking, aggregation and retrieval after RULER (Hsieh et al. 2024, arXiv 2404.06654), under any tokenizer.

Each example is exactly `seq_len` tokens: facts among filler, a question, and an answer that is the only part asked for.
Wording, words and the order of answers are our own: several words are asked for in an order that the question names, so
that one pass decides exactly. Under the tokenizer "ids" every word and every piece of fixed text is one token.
What is called RULER's below is of its released code: scripts/synthetic.yaml and scripts/data/synthetic.
"""

import abc
import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from sympow_jax.input_pipeline.tasks.passkey import RANDOM_DEPTH
from sympow_jax.input_pipeline.tasks.synthetic import Batch, TooShortError, as_batch, draw_distinct, row_stream
from sympow_jax.input_pipeline.tasks.words import Words, words_of

Draw = Callable[[int], np.ndarray]
Fact = tuple[float, np.ndarray]  # where in the filler, from 0 to 1, and its tokens
Example = tuple[list[Fact], np.ndarray, np.ndarray]  # facts, question, answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordTask(abc.ABC):
    """What tasks of words share.

    Attributes:
      seq_len: length of inputs and targets, in tokens.
      tokenizer: what load_tokenizer takes, or "ids".
      id_vocab: size of the vocabulary of "ids".
    """

    seq_len: int
    tokenizer: str = "byte"
    id_vocab: int = 64
    marks: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        self.batch(0, 0, 1)  # a length that is too short is known before anything is compiled

    @functools.cached_property
    def words(self) -> Words:
        """What the tokenizer makes of words."""
        return words_of(self.tokenizer, vocab_size=self.id_vocab, marks=self.marks)

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return self.words.tokenizer.vocab_size

    @abc.abstractmethod
    def example(self, draw: Draw) -> Example:
        """Facts, question and answer, from random numbers."""

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch; inputs are the targets shifted, BOS in front."""
        targets = np.zeros((batch_size, self.seq_len), np.int64)
        loss_mask = np.zeros((batch_size, self.seq_len))
        for row in range(batch_size):
            facts, question, answer = self.example(row_stream(seed, step, row))
            room = self._room(question, answer) - sum(len(tokens) for _, tokens in facts)
            self._require(room >= 0, f"add {-room} tokens")
            targets[row] = np.concatenate([*self._among_filler(facts, room), question, answer])
            loss_mask[row, self.seq_len - len(answer) :] = 1.0
        bos = np.full((batch_size, 1), self.words.tokenizer.bos_id)
        return as_batch(np.concatenate([bos, targets[:, :-1]], axis=1), targets, loss_mask)

    def _among_filler(self, facts: list[Fact], room: int) -> list[np.ndarray]:
        filler, parts, start = self.words.filler(room), [], 0
        for depth, tokens in sorted(facts, key=lambda fact: fact[0]):
            place = round(depth * room)
            parts += [filler[start:place], tokens]
            start = place
        return [*parts, filler[start:]]

    def _room(self, question: np.ndarray, answer: np.ndarray) -> int:
        return self.seq_len - len(question) - len(answer)

    def _distinct(self, draw: Draw, count: int) -> list[int]:
        if count > self.words.num_words:
            raise ValueError(f"vocab_size {self.vocab_size}: has {self.words.num_words} words, and {count} are needed")
        return draw_distinct(draw(count), self.words.num_words)

    def _require(self, enough: bool, how: str) -> None:
        if not enough:
            raise TooShortError(f"seq_len {self.seq_len}: too short for this {type(self).__name__}; {how}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(WordTask):
    """Chains of assignments x_0 = value, x_1 = x_0, ...: all variables that hold one chain's value are asked for.

    Attributes:
      num_chains: chains, of which one is asked for; their statements are mixed, each chain's in its own order.
      num_hops: assignments of a variable to a variable in each chain; RULER has 1 chain of 4.
    """

    num_chains: int = 1
    num_hops: int = 4
    marks: ClassVar[tuple[str, ...]] = ("\nVAR", " =", " = VAR", ".", "\nThe variables with the value", " in order:")

    def example(self, draw: Draw) -> Example:
        """See WordTask.example."""
        var, equals, equals_var, end, asks, in_order = self.marks
        length, encode = self.num_hops + 1, self.words.encode
        words = self._distinct(draw, self.num_chains * (length + 1))
        values, names = words[: self.num_chains], np.reshape(words[self.num_chains :], (-1, length)).tolist()
        order = np.argsort(draw(self.num_chains * length), kind="stable") % self.num_chains
        depths, said, facts = np.sort(draw(len(order))), [0] * self.num_chains, []
        for depth, chain in zip(depths.tolist(), order.tolist(), strict=True):
            hop = said[chain]
            source = (equals_var, names[chain][hop - 1]) if hop else (equals, values[chain])
            facts.append((depth, encode(var, names[chain][hop], *source, end)))
            said[chain] += 1
        return facts, encode(asks, values[0], in_order), encode(*names[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiKey(WordTask):
    """Needles of the same form, of which one is asked for by its key.

    Attributes:
      num_keys: needles; RULER has 4 (niah_multikey_1), and a haystack of them in its harder forms.
      depth: where the one that is asked for stands, from 0 (first) to 1 (last); -1 draws it uniformly, as the others.
    """

    num_keys: int = 4
    depth: float = RANDOM_DEPTH
    marks: ClassVar[tuple[str, ...]] = ("\nThe secret word of", " is", ".")

    def example(self, draw: Draw) -> Example:
        """See WordTask.example."""
        secret, is_, end = self.marks
        words, depths = self._distinct(draw, 2 * self.num_keys), draw(self.num_keys)
        if self.depth >= 0:
            depths[0] = self.depth
        keys, values = words[: self.num_keys], words[self.num_keys :]
        facts = [
            (depth, self.words.encode(secret, key, is_, value, end))
            for depth, key, value in zip(depths.tolist(), keys, values, strict=True)
        ]
        return facts, self.words.encode(secret, keys[0], is_), self.words.encode(values[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(WordTask):
    """A shuffled list in which few words are common: they are asked for in the order of their first appearance.

    Attributes:
      num_common: how many; RULER has 10.
      repeats: how often a common and an uncommon word stand in the list; RULER has 30 and 3, and 6 and 1 below 4,096
        tokens. As many uncommon words as fit, and exist.
    """

    num_common: int = 10
    repeats: tuple[int, ...] = (30, 3)
    marks: ClassVar[tuple[str, ...]] = ("\nThe most common words, in the order of their first appearance:",)

    def __post_init__(self):
        if len(self.repeats) != 2 or not 1 <= self.repeats[1] < self.repeats[0]:
            raise ValueError(f"word_repeats {self.repeats}: must be two numbers, the second from 1 up and less")
        super().__post_init__()

    def example(self, draw: Draw) -> Example:
        """See WordTask.example."""
        encode, (often, seldom) = self.words.encode, self.repeats
        question = encode(*self.marks)
        most = self.num_common + self.seq_len // seldom
        words = self._distinct(draw, max(self.num_common, min(most, self.words.num_words)))
        common = words[: self.num_common]
        room = self._room(question, encode(*common)) - often * sum(len(encode(word)) for word in common)
        self._require(room >= 0, f"add {-room} tokens, or lower num_pairs or word_repeats")
        listed = common * often
        for word in words[self.num_common :]:
            room -= seldom * len(encode(word))
            if room < 0:
                break
            listed += [word] * seldom
        listed = [listed[i] for i in np.argsort(draw(len(listed)), kind="stable")]
        first = dict.fromkeys(word for word in listed if word in set(common))
        return [(1.0, encode(*listed))], question, encode(*first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(WordTask):
    """A shuffled list in which word k stands N k^-2 / zeta(2) times: the first ones are asked for in order.

    Attributes:
      num_frequent: how many; RULER has 3, and the same exponent, but dots in the first rank, and asks for ranks 2 to 4.
    """

    num_frequent: int = 3
    marks: ClassVar[tuple[str, ...]] = ("\nThe most frequent words, the most frequent one first:",)

    def example(self, draw: Draw) -> Example:
        """See WordTask.example."""
        encode = self.words.encode
        words = self._distinct(draw, max(self.num_frequent, min(self.words.num_words, math.isqrt(self.seq_len) + 1)))
        question, answer = encode(*self.marks), encode(*words[: self.num_frequent])
        sizes = np.array([len(encode(word)) for word in words])
        room = self._room(question, answer)
        too_many = bisect.bisect_right(range(2 * self.seq_len), room, key=lambda n: zeta_counts(n, len(words)) @ sizes)
        counts = zeta_counts(max(too_many - 1, 0), len(words))
        top = np.append(counts, 0)[: self.num_frequent + 1]
        self._require(bool((np.diff(top) < 0).all()), f"the first {self.num_frequent} ranks must differ; add tokens")
        listed = np.repeat(words, counts)
        listed = listed[np.argsort(draw(len(listed)), kind="stable")].tolist()
        return [(1.0, encode(*listed))], question, answer


def zeta_counts(total: int, ranks: int) -> np.ndarray:
    """Whole part of total k^-2 / zeta(2) for k = 1..ranks."""
    return np.floor(total / (np.arange(1, ranks + 1) ** 2 * (math.pi**2 / 6))).astype(np.int64)
