"""Copying a sequence, and copying what matters out of noise (Gu and Dao 2023, arXiv 2312.00752)."""

import dataclasses

import numpy as np

from sympow_jax.input_pipeline.tasks.synthetic import Batch, TooShortError, as_batch, choose_distinct, uniform

BLANK, MARKER, FIRST_CONTENT = 0, 1, 2  # token ids


def _content(random: np.ndarray, vocab_size: int) -> np.ndarray:
    return FIRST_CONTENT + (random * (vocab_size - FIRST_CONTENT)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Copy:
    """c_1 ... c_n MARKER c_1 ... c_n, next-token prediction with the second half asked for; n = seq_len / 2.

    Attributes:
      seq_len: 2n, even: the length of inputs, c_1 ... c_n MARKER c_1 ... c_{n-1}.
      vocab_size: content tokens are uniform in [2, vocab_size).
    """

    seq_len: int
    vocab_size: int = 64

    def __post_init__(self):
        if self.seq_len < 2 or self.seq_len % 2:
            raise ValueError(f"seq_len {self.seq_len}: must be even, twice the number of copied tokens")
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size {self.vocab_size}: must be at least 4, two content tokens besides the marker")

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        n = self.seq_len // 2
        content = _content(uniform(seed, step, (batch_size, n)), self.vocab_size)
        tokens = np.concatenate([content, np.full((batch_size, 1), MARKER), content], axis=1)
        loss_mask = np.broadcast_to(np.arange(2 * n) >= n, (batch_size, 2 * n))
        return as_batch(tokens[:, :-1], tokens[:, 1:], loss_mask)


@dataclasses.dataclass(frozen=True)
class SelectiveCopy:
    """Content tokens scattered over blanks, then as many MARKERs, at which they are asked for in order.

    Attributes:
      seq_len: length of inputs: seq_len - num_content places, then num_content markers.
      num_content: tokens to remember.
      vocab_size: content tokens are uniform in [2, vocab_size).
    """

    seq_len: int
    num_content: int = 16
    vocab_size: int = 18

    def __post_init__(self):
        if not 0 < 2 * self.num_content <= self.seq_len:
            raise TooShortError(
                f"num_content {self.num_content}: must be at least 1 and at most half of {self.seq_len}"
            )
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size {self.vocab_size}: must be at least 4, two content tokens besides the marker")

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        n, places = self.num_content, self.seq_len - self.num_content
        random = uniform(seed, step, (batch_size, places + n))
        content = _content(random[:, places:], self.vocab_size)
        inputs = np.full((batch_size, self.seq_len), BLANK)
        np.put_along_axis(inputs, np.sort(choose_distinct(random[:, :places], n), axis=1), content, axis=1)
        inputs[:, places:] = MARKER
        targets, loss_mask = np.zeros_like(inputs), np.zeros(inputs.shape)
        targets[:, places:], loss_mask[:, places:] = content, 1.0
        return as_batch(inputs, targets, loss_mask)
