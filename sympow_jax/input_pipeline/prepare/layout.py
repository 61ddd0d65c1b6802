"""How the tokenised documents of one split are cut into rows: arithmetic on lengths, no tokens."""

import dataclasses

import numpy as np

from sympow_jax.input_pipeline.hashing import permutation
from sympow_jax.input_pipeline.prepare.shards import TokenStream


@dataclasses.dataclass(frozen=True)
class Layout:
    """Pieces of documents laid end to end and cut into rows; `order[r]` is the piece of that line that is row r."""

    document_length: int
    starts: np.ndarray  # [pieces] where each piece starts in the token stream
    ends: np.ndarray  # [pieces] cumulative length, so where each piece ends in the line
    documents: np.ndarray  # [pieces] the document of each piece
    order: np.ndarray  # [rows]

    @property
    def num_tokens(self) -> int:
        """Tokens in the line, those of an incomplete last row included."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.order)

    def clusters(self) -> np.ndarray:
        """[rows] the document in which each row begins."""
        return self.documents[np.searchsorted(self.ends, self.order * self.document_length, side="right")]

    def offsets(self) -> np.ndarray:
        """[pieces + 1] where each piece starts in the line, and its end."""
        return np.concatenate([[0], self.ends])

    def row(self, stream: TokenStream, row: int) -> np.ndarray:
        """Tokens of one row."""
        start = int(self.order[row]) * self.document_length
        return self.tokens(stream, start, start + self.document_length)

    def tokens(self, stream: TokenStream, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the line."""
        parts = []
        piece = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            length = min(stop, int(self.ends[piece])) - start
            before = int(self.ends[piece - 1]) if piece else 0
            place = int(self.starts[piece]) + start - before
            parts.append(stream.read(place, place + length))
            start += length
            piece += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def arrange(
    stream: TokenStream, chosen: np.ndarray, documents: str, length: int, min_length: int, seed: int, split: str
) -> Layout:
    """The rows of the `chosen` documents of one split; see build.Request for what `documents` means."""
    chosen = chosen[stream.lengths[chosen] >= min_length]
    stream_id = 0 if split == "train" else 1
    if documents in ("packed", "concatenate"):
        chosen = chosen[permutation(seed, stream_id, len(chosen))]
        # the stream holds one BOS after each document; a packed store needs none, its offsets say where documents end
        extra = 0 if documents == "packed" else 1
        ends = np.cumsum(stream.lengths[chosen] + extra)
        total = int(ends[-1]) if len(ends) else 0
        order = np.arange(min(total, 1) if documents == "packed" else total // length)
        return Layout(length, stream.starts[chosen], ends, chosen, order)
    whole = stream.lengths[chosen] // length
    if documents == "truncate":
        whole = np.minimum(whole, 1)
    which = np.repeat(np.arange(len(chosen)), whole)
    within = np.arange(len(which)) - np.repeat(np.cumsum(whole) - whole, whole)
    starts = stream.starts[chosen][which] + within * length
    sizes = np.full(len(which), length)
    pieces = chosen[which]
    if documents == "split" and split == "train":
        rest = stream.lengths[chosen] - whole * length
        keep = permutation(seed, 4, len(chosen))
        keep = keep[rest[keep] > 0]
        starts = np.concatenate([starts, (stream.starts[chosen] + whole * length)[keep]])
        sizes = np.concatenate([sizes, rest[keep] + 1])
        pieces = np.concatenate([pieces, chosen[keep]])
    ends = np.cumsum(sizes)
    num_rows = (int(ends[-1]) if len(ends) else 0) // length
    layout = Layout(length, starts, ends, pieces, np.arange(num_rows))
    return dataclasses.replace(layout, order=_shuffle(layout.clusters(), seed, stream_id))


def _shuffle(clusters: np.ndarray, seed: int, stream_id: int) -> np.ndarray:
    """A random order of the rows in which rows of one document keep their own: a stable sort by cluster joins them."""
    shuffled = permutation(seed, stream_id, len(clusters))
    places = np.argsort(clusters[shuffled], kind="stable")
    order = np.empty(len(clusters), np.int64)
    order[places] = np.argsort(clusters, kind="stable")
    return order
