"""Recall from a memory that changes: a stack, and pairs whose values are overwritten. Both go on for any length."""

import dataclasses

import numpy as np

from sympow_jax.input_pipeline.tasks.synthetic import Batch, as_batch, row_stream

POP, FIRST_CONTENT = 1, 2  # token ids


@dataclasses.dataclass(frozen=True)
class StackRecall:
    """Tokens are pushed; at each POP the last one that is still there is asked for, and leaves.

    Push and pop are equally likely, except that an empty stack is pushed and a full one popped: the Dyck language of
    vocab_size - 2 kinds of brackets and bounded depth (Hewitt et al. 2020, arXiv 2010.07515), asked for what it closes.

    Attributes:
      seq_len: length of inputs; a POP has a target, a push has none.
      max_depth: how many tokens the stack holds.
      vocab_size: content tokens are uniform in [2, vocab_size); chance is 1 / (vocab_size - 2).
    """

    seq_len: int
    max_depth: int = 8
    vocab_size: int = 64

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"seq_len {self.seq_len}: must be at least 2, a push and a pop")
        if self.max_depth < 1:
            raise ValueError(f"max_depth {self.max_depth}: must be at least 1")
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size {self.vocab_size}: must be at least 4, two content tokens besides POP")

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        inputs = np.full((batch_size, self.seq_len), POP)
        targets = np.zeros_like(inputs)
        for row in range(batch_size):
            draw, stack = row_stream(seed, step, row), []
            choices = zip(draw(self.seq_len), draw(self.seq_len), strict=True)
            for t, (for_push, for_token) in enumerate(choices):
                if not stack or (len(stack) < self.max_depth and for_push < 0.5):
                    inputs[row, t] = FIRST_CONTENT + int(for_token * (self.vocab_size - FIRST_CONTENT))
                    stack.append(inputs[row, t])
                else:
                    targets[row, t] = stack.pop()
        return as_batch(inputs, targets, inputs == POP)


@dataclasses.dataclass(frozen=True)
class ForgettingRecall:
    """k v k v ...: at a key its last value is asked for, and the value that follows takes its place.

    Keys are drawn from the n of the example, values anew each time, so what was overwritten must be forgotten and
    the distance to the answer is geometric with mean 2n, at any length. A key's first occurrence asks for nothing.

    Attributes:
      seq_len: even; half as many writes.
      num_keys: n.
      vocab_size: V. Keys are in [1, V/2), values uniform in [V/2, V); chance is 2 / V.
    """

    seq_len: int
    num_keys: int = 8
    vocab_size: int = 64

    def __post_init__(self):
        if self.seq_len < 2 or self.seq_len % 2:
            raise ValueError(f"seq_len {self.seq_len}: must be even, keys and values in turn")
        if not 1 <= self.num_keys <= self.vocab_size // 2 - 1:
            raise ValueError(f"vocab_size {self.vocab_size}: must hold {self.num_keys} distinct keys below its half")

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        half, writes = self.vocab_size // 2, self.seq_len // 2
        inputs = np.zeros((batch_size, self.seq_len), np.int64)
        targets = np.zeros_like(inputs)
        for row in range(batch_size):
            draw = row_stream(seed, step, row)
            names = 1 + np.argsort(draw(half - 1), kind="stable")[: self.num_keys]
            keys = names[(draw(writes) * self.num_keys).astype(int)].tolist()
            values = (half + draw(writes) * (self.vocab_size - half)).astype(int).tolist()
            held: dict[int, int] = {}
            for i, (key, value) in enumerate(zip(keys, values, strict=True)):
                targets[row, 2 * i] = held.get(key, 0)
                held[key] = value
            inputs[row, ::2], inputs[row, 1::2] = keys, values
        return as_batch(inputs, targets, targets > 0)
