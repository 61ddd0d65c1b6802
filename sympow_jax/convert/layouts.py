"""How the arrays of a layer lie in another library's tensors: a layout splits a tensor into ours and joins it again."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Layout(Protocol):
    """One tensor <-> some of our arrays, without loss."""

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape, from those of our arrays."""
        ...

    def split(self, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Our arrays of these shapes, views where that can be, in the dtype of the tensor or float32."""
        ...

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of our float32 arrays."""
        ...


class Columns:
    """Side by side along the last dim, as we keep them: [in, out]; a table, a norm or a bias is one alone."""

    def shape(self, shapes):
        """See Layout."""
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def split(self, tensor, shapes):
        """See Layout."""
        return np.split(tensor, _ends(shapes), axis=-1)

    def join(self, arrays):
        """See Layout."""
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


class Rows:
    """One above the other, [out, in]: PyTorch's Linear, transposed to ours; biases [out]."""

    def shape(self, shapes):
        """See Layout."""
        return Columns().shape(shapes)[::-1]

    def split(self, tensor, shapes):
        """See Layout."""
        return [part.T for part in np.split(tensor, _ends(shapes), axis=0)]

    def join(self, arrays):
        """See Layout."""
        return arrays[0].T if len(arrays) == 1 else np.concatenate([array.T for array in arrays], axis=0)


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """Rows ordered by head, and within a head by array: [num_heads, query | key | value, head_dim, in].

    Attributes:
      num_heads: of each of the arrays.
    """

    num_heads: int

    def shape(self, shapes):
        """See Layout."""
        return Rows().shape(shapes)

    def split(self, tensor, shapes):
        """See Layout."""
        rest = tensor.shape[1:]
        heads = tensor.reshape(self.num_heads, len(shapes), -1, *rest)
        return [heads[:, n].reshape(-1, *rest).T for n in range(len(shapes))]

    def join(self, arrays):
        """See Layout."""
        rows = [array.T.reshape(self.num_heads, -1, *array.shape[:-1]) for array in arrays]
        stacked = np.stack(rows, axis=1)
        return stacked.reshape(-1, *stacked.shape[3:])


class ScaleMinusOne:
    """The scale of a norm, kept as its difference from 1."""

    def shape(self, shapes):
        """See Layout."""
        return shapes[0]

    def split(self, tensor, shapes):
        """See Layout."""
        return [np.float32(1) + tensor.astype(np.float32)]

    def join(self, arrays):
        """See Layout."""
        return arrays[0] - np.float32(1)


def _ends(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.cumsum([shape[-1] for shape in shapes])[:-1]
