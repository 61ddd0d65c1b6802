"""How likely given texts go on as given: sums of log-probabilities over the last tokens of rows of any lengths.

Rows are read side by side, the longest first, padded at the end to few lengths, so that few programs are compiled.
Models whose state has a constant size read a row in chunks through one program, so a document of any length is one
pass with carried state, and without a state what fits a chunk; other models read a row in one call.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sympow_jax import sharding
from sympow_jax.models.model import Model

_SHORTEST = 64  # tokens that a row is padded to at least


class ContinuationScorer:
    """Scores the ends of rows of tokens with one model.

    Args:
      model, params: see sympow_jax.models; on a mesh rows lie over data and fsdp.
      batch_size: rows that a device reads side by side; models that do not stream read fewer of more than `chunk_size`.
      chunk_size: tokens that a device of a streaming model reads at a time.

    Attributes:
      num_programs: compiled so far.
    """

    def __init__(self, model: Model, params: Any, *, batch_size: int = 16, chunk_size: int = 512):
        self._model, self._params = model, params
        self._rows, self._shards = sharding.shard_counts(model.mesh)
        self._chunk, self._batch = chunk_size * self._shards, batch_size
        whole = sharding.everywhere(model.mesh)

        @functools.partial(jax.jit, static_argnames="length", out_shardings=((whole, whole), None))
        def step(params, tokens, state, length):
            return model.scores(params, tokens[:, :-1], tokens[:, 1:], state=state, length=length)

        self._step, self._shapes = step, set()

    @property
    def num_programs(self) -> int:
        """Programs compiled so far, one for each shape of a call."""
        return len(self._shapes)

    def scores(self, rows: Sequence[np.ndarray], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """(sum of log p of the last counts[n] tokens of rows[n] in nats, whether each of them is the most likely).

        Args:
          rows: token ids, at least one before those that are scored.
          counts: how many tokens at the end of each row are scored, at least 1.

        Raises:
          ValueError: a row without a token before those that are scored, or nothing to score.
        """
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if not 1 <= count < len(row):
                raise ValueError(
                    f"row {number}: {count} tokens of {len(row)} are to be scored, legal are 1 to {len(row) - 1}"
                )
        found: dict[int, tuple[float, bool]] = {}
        for numbers, padded in self._batches([len(row) - 1 for row in rows]):
            found |= self._read(numbers, [rows[n] for n in numbers], [counts[n] for n in numbers], padded)
        return [found[n] for n in range(len(rows))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """(numbers of rows to read side by side, tokens that they are padded to), the longest first."""
        queue = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        while queue:
            longest = lengths[queue[0]]
            padded = self._padded(longest)
            size = self._size(padded)
            if self._model.depends_on_length:
                size = min(size, sum(lengths[n] == longest for n in queue))
            yield queue[:size], padded
            queue = queue[size:]

    def _padded(self, length: int) -> int:
        """Tokens that rows of `length` are padded to: a power of two, or, of long ones, a multiple of the chunk."""
        step = self._chunk if self._model.streams_constant else 4096 * self._shards
        padded = (
            max(_SHORTEST * self._shards, 1 << (length - 1).bit_length())
            if length <= step
            else -(-length // step) * step
        )
        return min(padded, self._model.max_length or padded)

    def _size(self, padded: int) -> int:
        """Rows of a call on all devices."""
        crowded = not self._model.streams_constant and padded > self._chunk
        return self._rows * max(1, self._batch * self._chunk // padded if crowded else self._batch)

    def _read(
        self, numbers: Sequence[int], rows: Sequence[np.ndarray], counts: Sequence[int], padded: int
    ) -> dict[int, tuple[float, bool]]:
        size = self._size(padded)
        tokens = np.zeros((size, padded + 1), np.int32)  # what pads a row comes after it and is not counted
        scored = np.zeros((size, padded), bool)
        for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
            tokens[at, : len(row)] = row
            scored[at, len(row) - 1 - count : len(row) - 1] = True
        streams = self._model.streams_constant
        chunk = min(self._chunk, padded) if streams else padded
        state = self._model.initial_state(size, padded) if padded > chunk else None
        length = len(rows[0]) - 1 if self._model.depends_on_length else 0
        total, greedy = np.zeros(size), np.ones(size, bool)
        for start in range(0, padded, chunk):
            window = tokens[:, start : start + chunk + 1]
            self._shapes.add((window.shape, state is None, length))
            (nll, likely), state = self._step(self._params, window, state, length=length)
            here = scored[:, start : start + chunk]
            total -= np.where(here, np.asarray(nll, np.float64), 0.0).sum(axis=1)
            greedy &= (np.asarray(likely) | ~here).all(axis=1)
        return {n: (float(total[at]), bool(greedy[at])) for at, n in enumerate(numbers)}
