"""Token losses of long documents, summed over ranges of positions in float64 on the host.

Models whose state has a constant size read a document in chunks, left to right, through one compiled program (one for
each window length under dynamic_ntk), so memory does not grow with its length. Other models (softmax) read a whole
window in one call: one program for each window length. Either way inputs are the targets shifted right by one with the
store's BOS in front.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


@runtime_checkable
class LanguageModel(Protocol):
    """What evaluations need of a model; see sympow_jax.models."""

    @property
    def streams_constant(self) -> bool:
        """Whether the streaming state has a size that does not depend on how much was read."""
        ...

    @property
    def depends_on_length(self) -> bool:
        """Whether `length`, the longest context of the stream, changes the result."""
        ...

    def initial_state(self, batch_size: int, max_length: int) -> Any:
        """The state before the first token."""
        ...

    def nll(self, params, inputs, targets, *, state=None, length=0) -> tuple[jax.Array, Any]:
        """Negative log-likelihood in nats of each target [B, T] float32, and the state after the last one."""
        ...


class Scorer:
    """Scores windows of tokens with one model.

    Attributes:
      params: the model's parameters; may be replaced by others of the same shapes.
      chunk_size: tokens read at a time by streaming models.
      batch_size: windows read side by side, padded up to it; models that do not stream get fewer, so that a call
        holds about batch_size * chunk_size tokens, and at least one window.
    """

    def __init__(self, model: LanguageModel, params: Any, *, bos_id: int, chunk_size: int, batch_size: int):
        if chunk_size < 1 or batch_size < 1:
            raise ValueError(f"chunk_size {chunk_size}, batch_size {batch_size}: both must be at least 1")
        self.chunk_size, self.batch_size = chunk_size, batch_size
        self.params, self._model, self._bos_id = params, model, bos_id

        @functools.partial(jax.jit, static_argnames="length")
        def step(params, tokens, state, length):
            return model.nll(params, tokens[:, :-1], tokens[:, 1:], state=state, length=length)

        self._step = step

    @property
    def depends_on_length(self) -> bool:
        """Whether the loss of a target depends on how long the window is that is read, beyond what precedes it."""
        return self._model.depends_on_length

    def losses(self, targets: np.ndarray) -> Iterator[tuple[slice, int, np.ndarray]]:
        """Yields (rows, start, nll [rows, c] float32) for windows `targets` [N, L], each read from a fresh state."""
        num_windows, length = targets.shape
        streams = self._model.streams_constant
        chunk = min(self.chunk_size, length) if streams else length
        batch = self.batch_size if streams else max(1, self.batch_size * min(length, self.chunk_size) // length)
        padded = -(-length // chunk) * chunk
        context = length if self._model.depends_on_length else 0
        for first in range(0, num_windows, batch):
            rows = slice(first, min(first + batch, num_windows))
            window = np.zeros((batch, padded + 1), targets.dtype)  # padding is scored and dropped
            window[:, 0] = self._bos_id
            window[: rows.stop - first, 1 : length + 1] = targets[rows]
            state = self._model.initial_state(batch, padded) if streams else None
            for start in range(0, padded, chunk):
                tokens = jnp.asarray(window[:, start : start + chunk + 1], jnp.int32)
                nll, state = self._step(self.params, tokens, state, length=context)
                yield rows, start, np.asarray(nll)[: rows.stop - first, : min(chunk, length - start)]

    def cumulative(self, targets: np.ndarray, points: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sum of the losses of the first `points[m]` targets of each window [N, L] -> [N, M] float64."""
        edges = np.unique([0, *points])
        if edges[-1] > targets.shape[1]:
            raise ValueError(f"points: {edges[-1]} lies beyond the window of {targets.shape[1]} tokens")
        sums = np.zeros((len(targets), len(edges)), np.float64)
        for rows, start, nll in self.losses(targets):
            segments = np.searchsorted(edges, np.arange(start, start + nll.shape[1]), side="right")
            for segment in np.unique(segments[segments < len(edges)]):
                sums[rows, segment] += nll[:, segments == segment].sum(axis=1, dtype=np.float64)
        return np.cumsum(sums, axis=1)[:, np.searchsorted(edges, points)]
