"""Token losses of long documents, summed over ranges of positions in float64 on the host.

Models whose state has a constant size read a document in chunks, left to right, through one compiled program (one for
each window length under dynamic_ntk), so memory does not grow with its length; what fits a chunk they read without a
state. Other models (softmax) read a whole window in one call: one program for each window length. Either way inputs are
the targets shifted right by one with the store's BOS in front.

On a mesh rows lie over data and fsdp and the tokens of a call over seq. A process reads the windows of its own devices
(`Scorer.held`). The losses of a call come to every device, so that all processes have the same sums; what does not
divide is padded.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from sympow_jax import sharding


@runtime_checkable
class LanguageModel(Protocol):
    """What evaluations need of a model; see sympow_jax.models."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that calls are spread over; None is one."""
        ...

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

    Args:
      model, params, bos_id: see above.
      chunk_size: tokens of a window that a device of a streaming model reads at a time.
      batch_size: windows that a device reads side by side; models that do not stream get fewer, so that a call holds
        about batch_size * chunk_size tokens on a device, and at least one window.
      num_windows: how many there are to score at once at most.

    Attributes:
      params: the model's parameters; may be replaced by others of the same shapes.
      batch_size: windows of a call on all devices, which fewer are padded to.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Any,
        *,
        bos_id: int,
        chunk_size: int,
        batch_size: int,
        num_windows: int,
    ):
        if chunk_size < 1 or batch_size < 1:
            raise ValueError(f"chunk_size {chunk_size}, batch_size {batch_size}: both must be at least 1")
        self._rows, self._shards = sharding.shard_counts(model.mesh)
        self._chunk_size = chunk_size * self._shards
        self.batch_size = _multiple(min(batch_size * self._rows, num_windows), self._rows)
        self.params, self._model, self._bos_id = params, model, bos_id
        whole = sharding.everywhere(model.mesh)

        @functools.partial(jax.jit, static_argnames="length", donate_argnames="state", out_shardings=(whole, None))
        def step(params, tokens, state, length):
            return model.nll(params, tokens[:, :-1], tokens[:, 1:], state=state, length=length)

        self._step = step

    @property
    def depends_on_length(self) -> bool:
        """Whether the loss of a target depends on how long the window is that is read, beyond what precedes it."""
        return self._model.depends_on_length

    def carries_state(self, length: int) -> bool:
        """Whether windows of `length` tokens are read in several calls, with a state between them."""
        return self._model.streams_constant and length > self._chunk_size

    def call_shape(self, length: int) -> tuple[int, int]:
        """(windows, tokens of each) of one call on all devices, for windows of `length` tokens."""
        streams, chunk = self._model.streams_constant, min(self._chunk_size, length)
        batch = self.batch_size if streams else _multiple(max(1, self.batch_size * chunk // length), self._rows)
        halves = 2 * self._shards if self._shards > 1 else 1  # softmax works on halves of shards
        return batch, _multiple(chunk if streams else length, halves)

    def trace(self, length: int, state: Any) -> jax.stages.Traced:
        """The program of a call, for `params` and a `state`, or None, that may be shapes."""
        batch, chunk = self.call_shape(length)
        where = sharding.rows_sharding(self._model.mesh)
        tokens = jax.ShapeDtypeStruct((batch, chunk + 1), np.int32, sharding=where)
        return self._step.trace(self.params, tokens, state, length=length if self._model.depends_on_length else 0)

    def held(self, num_windows: int) -> np.ndarray:
        """Which of so many windows that are scored together this process must have read, [num_windows] bool."""
        return sharding.held_rows(self._model.mesh, num_windows)

    def losses(self, targets: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Yields (rows, start, nll [rows, c] float32) for windows `targets` [N, L], each read from a fresh state.

        Those that are not `held` may hold anything.
        """
        num_windows, length = targets.shape
        context = length if self._model.depends_on_length else 0
        batch, chunk = self.call_shape(length)
        padded = _multiple(length, chunk)
        for windows in self._calls(num_windows, batch):
            real = windows < num_windows
            rows = windows[real]
            window = np.zeros((batch, padded + 1), targets.dtype)  # padding is scored and dropped
            window[:, 0] = self._bos_id
            window[real, 1 : length + 1] = targets[rows]
            state = self._model.initial_state(batch, padded) if self.carries_state(length) else None
            for start in range(0, padded, chunk):
                tokens = sharding.place_rows(self._model.mesh, window[:, start : start + chunk + 1].astype(np.int32))
                nll, state = self._step(self.params, tokens, state, length=context)
                yield rows, start, np.asarray(nll)[real, : min(chunk, length - start)]

    def _calls(self, num_windows: int, batch: int) -> np.ndarray:
        """The windows of each call, [calls, batch], num_windows for none: a shard of rows reads its block of them."""
        windows = np.arange(_multiple(num_windows, self._rows)).reshape(self._rows, -1)
        windows = np.pad(windows, ((0, 0), (0, -windows.shape[1] % (batch // self._rows))), constant_values=num_windows)
        return windows.reshape(self._rows, -1, batch // self._rows).swapaxes(0, 1).reshape(-1, batch)

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


def _multiple(number: int, of: int) -> int:
    """The least multiple that is not below `number`."""
    return -(-number // of) * of
