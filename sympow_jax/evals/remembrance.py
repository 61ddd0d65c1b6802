"""What the last targets of a long document owe to the tokens before each position, and how large the states grow.

The effective remembrance of Buitrago and Gu (arXiv 2507.02782), for targets y_0, ..., y_{T-1} of a document, of which
the last n are predicted, and tokens d_0, d_1, ... of another held-out document:

    q_t(v | p)      = the distribution of token t given BOS, d_0, ..., d_{p-1}, y_p, ..., y_{t-1},  0 <= p <= T - n
    remembrance(p)  = mean over t >= T - n of -log q_t(y_t | p) + log q_t(y_t | 0), in nats per token
    variation(p)    = mean over t >= T - n of 1/2 sum_v |q_t(v | p) - q_t(v | 0)|, from 0 to 1

remembrance(p) is what the tokens before p are worth to the last targets: 0 where they are forgotten, below 0 where they
do harm. variation(p) is how much they count at all. The paper cuts the first p tokens off. Here they are replaced by as
many of another document, so that every target keeps its position, the state its age, and only what was read differs:
cut off, the rest is a shorter text, which a model that fails at long ones may well predict better.

Document d is the next one scored that has another source, or, where all have one, the next. Positions are dense near
both ends of the context. At each of them, the root mean square of the state of each layer and of its normaliser, after
p inputs (BOS, y_0, ..., y_{p-2}): what a collapse beyond the trained length begins with.
"""

import collections
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sympow_jax import sharding
from sympow_jax.evals import bootstrap
from sympow_jax.evals.length_generalisation import (
    DOCUMENTS_AT_ONCE,
    NUM_TARGETS,
    choose_documents,
    read_documents,
    result_header,
)
from sympow_jax.evals.state_norms import linear_layers, state_norms
from sympow_jax.evals.streaming import Scorer
from sympow_jax.input_pipeline.store import Store
from sympow_jax.models.model import Features, Model
from sympow_jax.typing import Array, PyTree

CSV_HEADER = ("curve", "position", "value", "low", "high")
_STEP = 32  # tokens between neighbouring positions; more than a pass that decodes, which is compiled layer by layer
_STEPS = 32  # that a shorter context has at least


def remembrance(
    model: Model,
    params: PyTree,
    store: Store,
    *,
    length: int,
    train_length: int,
    run: Mapping[str, Any] | None = None,
    num_documents: int = 48,
    num_targets: int = NUM_TARGETS,
    chunk_size: int = 512,
    batch_size: int = DOCUMENTS_AT_ONCE,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measures a model on documents of one length; returns what goes into eval/<name>.json and eval/<name>.npz.

    {"length", "loss": {"nll", "ci95"}, with nothing replaced, "remembrance": {"position", "difference", "ci95",
    "total_variation", "total_variation_ci95"}, "state_norms": [{"layer", "state", "normalizer"}], at these positions},
    after the header of all results; intervals are paired bootstraps over source documents. state_norms has the layers
    with a finite state (see `linear_layers`), and is empty without any.

    Args:
      model, params: see sympow_jax.models.
      store: held-out documents of at least `length` tokens, two or more.
      length: T.
      train_length: the context of training, for the file.
      run: what identifies the run in the file: step, variant, seed, dtype, position_overrides.
      num_documents: documents scored (all of them if the store has fewer), chosen by `seed`.
      num_targets: n; at most half of the length is used.
      chunk_size, batch_size: see Scorer.
      seed: of the choice of documents and of the bootstrap.

    Raises:
      ValueError: a length below 2 or beyond the documents, or fewer than two documents.
    """
    _check(store, length, num_documents)
    num_targets = max(1, min(num_targets, length // 2))
    positions = replaced_before(length - num_targets)
    rows = choose_documents(store.num_documents, num_documents, seed=seed)
    clusters = np.asarray(store.clusters)[rows]
    donors = rows[other_documents(clusters)]
    sizes = {"chunk_size": chunk_size, "batch_size": batch_size}
    reader = _Reader(model, params, length=length, num_targets=num_targets, num_documents=len(rows), **sizes)
    groups = []
    for first in range(0, len(rows), reader.batch_size):
        group = slice(first, first + reader.batch_size)
        held = sharding.held_rows(model.mesh, reader.batch_size)[: len(rows[group])]
        own = read_documents(store, rows[group], length, held)
        others = read_documents(store, donors[group], length - num_targets, held)
        groups.append(_document_sums(reader, own, others, positions, store.bos_id))
    arrays = {
        "document_ids": rows,
        "donor_ids": donors,
        "clusters": clusters,
        "digest": np.asarray(str(store.digest)),
        "num_targets": np.asarray(num_targets),
        "position": np.asarray(positions),
        "layers": np.asarray(linear_layers(model.config), np.int64),
        **{name: np.concatenate([group[name] for group in groups]) for name in groups[0]},
    }
    header = result_header(run or {}, store, arrays, train_length) | {"length": length}
    return header | summarise(arrays, seed=seed), arrays


def _check(store: Store, length: int, num_documents: int) -> None:
    if not 2 <= length <= store.document_length:
        raise ValueError(
            f"lengths: {length} tokens, and the store's documents have {store.document_length}; the longest of the "
            "lengths is from 2 to that"
        )
    if min(store.num_documents, num_documents) < 2:
        raise ValueError(
            f"num_documents {num_documents}, of {store.num_documents} that have {length} tokens: remembrance replaces "
            "the tokens of one by those of another; give at least 2, or shorter lengths"
        )


def replaced_before(context: int) -> list[int]:
    """The positions p of a context of so many tokens before the first target, ascending, the last the whole context.

    Their distances from the targets are powers of two times a step, and so are those from the first of them: memory and
    what was read first are both seen on a logarithmic scale.
    """
    step = _step(context)
    count = context // step
    powers = [1 << power for power in range(count.bit_length())]
    steps = {0, count, *powers, *(count - power for power in powers)}
    return sorted({context - step * number for number in steps} - {0})


def _step(context: int) -> int:
    """The power of two that positions are multiples of, counted from the targets."""
    return 1 << (max(1, min(_STEP, context // _STEPS)).bit_length() - 1)


def other_documents(clusters: np.ndarray) -> np.ndarray:
    """For each of N documents the place of the next one, round and round, of another cluster, or of the next one."""
    count = len(clusters)
    chosen = np.zeros(count, np.int64)
    for place in range(count):
        later = (place + np.arange(1, count)) % count
        foreign = later[clusters[later] != clusters[place]]
        chosen[place] = foreign[0] if len(foreign) else later[0]
    return chosen


class _Reader:
    """Reads rows of documents of one length, as a `Scorer` does, but makes logits at their last targets alone.

    Rows that this process does not hold may be anything.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree,
        *,
        length: int,
        num_targets: int,
        num_documents: int,
        chunk_size: int,
        batch_size: int,
    ):
        sizes = {"chunk_size": chunk_size, "batch_size": batch_size, "num_windows": num_documents}
        scorer = Scorer(model, params, bos_id=0, **sizes)
        self.batch_size, self._tokens = scorer.call_shape(length)
        self._carries, self._context = scorer.carries_state(length), length - num_targets
        self._model, self._params, self._length = model, params, length
        self._told = length if model.depends_on_length else 0
        whole, self._place = sharding.everywhere(model.mesh), functools.partial(sharding.place_rows, model.mesh)

        @functools.partial(jax.jit, donate_argnames="state", out_shardings=(whole, None))
        def advance(params, inputs, state):
            state = model.features(params, inputs, state=state, length=self._told).state
            return state_norms(state), state

        @functools.partial(jax.jit, static_argnames="first", out_shardings=(whole, None))
        def score(params, tokens, state, first):
            found = model.features(params, tokens[:, :-1], state=state, length=self._told)
            scored = slice(first, first + num_targets)
            last = Features(found.hidden[:, scored], found.kernel, ())
            return model.token_losses(last, tokens[:, 1:][:, scored])[0], last.hidden

        @functools.partial(jax.jit, out_shardings=whole)
        def compare(params, hidden, others):
            kernel = model.bind(params).output_kernel()
            return model.variation(Features(hidden, kernel, ()), Features(others, kernel, ()))

        self._advance, self._score, self._compare = advance, score, compare

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, Array]:
        """Loss sums [B] float64 of the last targets of rows [B, 1 + T] that begin with BOS, and what predicts them."""
        if self._carries:
            ((_, _, state),) = collections.deque(self._stream(tokens, self._tokens), maxlen=1)
            nll, hidden = self._score(self._params, self._place(tokens[:, self._context :]), state, first=0)
        else:
            padded = np.pad(tokens, ((0, 0), (0, self._tokens - self._length)))
            nll, hidden = self._score(self._params, self._place(padded), None, first=self._context)
        return np.asarray(nll, np.float64).sum(axis=1), hidden

    def variation(self, hidden: Array, others: Array) -> np.ndarray:
        """Sums [B] float64 over the last targets of the total variation between two readings."""
        return np.asarray(self._compare(self._params, hidden, others), np.float64).sum(axis=1)

    def norms(self, tokens: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """`state_norms` after so many inputs, [B, positions, layers, 2] float64."""
        if not linear_layers(self._model.config):
            return np.zeros((len(tokens), len(positions), 0, 2))
        stream = self._stream(tokens, _step(self._context))
        found = [np.stack(norms, axis=1) for stop, norms, _ in stream if stop in positions]
        return np.stack(found, axis=1).astype(np.float64)

    def _stream(self, tokens: np.ndarray, size: int) -> Iterator[tuple[int, list[np.ndarray], PyTree]]:
        """Reads the context in parts of `size` inputs, the first what is left over: (inputs so far, norms, state)."""
        state = self._model.initial_state(len(tokens), self._length)
        stops = range(self._context % size or size, self._context + 1, size)
        for start, stop in itertools.pairwise((0, *stops)):
            norms, state = self._advance(self._params, self._place(tokens[:, start:stop]), state)
            jax.block_until_ready(state)  # a backend holds a bounded number of programs that wait for each other
            yield stop, [np.asarray(norm) for norm in norms], state


def _document_sums(
    reader: _Reader, own: np.ndarray, others: np.ndarray, positions: Sequence[int], bos_id: int
) -> dict[str, np.ndarray]:
    """What the npz keeps of documents own [N, T], whose first tokens are replaced by those of others [N, T - n]."""
    count, length = own.shape
    tokens = np.zeros((reader.batch_size, 1 + length), np.int32)  # rows of padding are read and dropped
    tokens[:, 0], tokens[:count, 1:] = bos_id, own
    true, hidden = reader.read(tokens)
    sums, variations = [], []
    for position in positions:
        tokens[:count, 1 : 1 + position] = others[:, :position]
        replaced, changed = reader.read(tokens)
        sums.append(replaced)
        variations.append(reader.variation(changed, hidden))
    tokens[:count, 1:] = own
    norms = reader.norms(tokens, positions)
    found = {"true_sums": true, "replaced_sums": np.stack(sums, 1), "variation_sums": np.stack(variations, 1)}
    found |= {"state_norms": norms[..., 0], "normalizer_norms": norms[..., 1]}
    return {name: array[:count] for name, array in found.items()}


def summarise(arrays: Mapping[str, np.ndarray], *, seed: int = 0) -> dict[str, Any]:
    """Means and 95% intervals from what the npz has of each document."""
    clusters, replaced = arrays["clusters"], arrays["replaced_sums"]
    counts = np.full(replaced.shape, arrays["num_targets"])
    true = np.broadcast_to(arrays["true_sums"][:, None], replaced.shape)
    nll, nll_ci95 = bootstrap.mean_and_interval(true[:, :1], counts[:, :1], clusters, seed=seed)
    difference, ci95 = bootstrap.difference_and_interval((true, counts), (replaced, counts), clusters, seed=seed)
    variation, variation_ci95 = bootstrap.mean_and_interval(arrays["variation_sums"], counts, clusters, seed=seed)
    norms = (arrays[f"{name}_norms"].mean(axis=0).T.tolist() for name in ("state", "normalizer"))
    return {
        "loss": {"nll": float(nll[0]), "ci95": nll_ci95[0].tolist()},
        "remembrance": {
            "position": arrays["position"].tolist(),
            "difference": difference.tolist(),
            "ci95": ci95.tolist(),
            "total_variation": variation.tolist(),
            "total_variation_ci95": variation_ci95.tolist(),
        },
        "state_norms": [
            {"layer": layer, "state": state, "normalizer": normalizer}
            for layer, state, normalizer in zip(arrays["layers"].tolist(), *norms, strict=True)
        ],
    }


def csv_rows(result: Mapping[str, Any]) -> list[list[Any]]:
    """The curves of a result as a table, CSV_HEADER; low and high are the 95% interval, where there is one."""
    table, rows = result["remembrance"], []
    for name, interval in (("difference", "ci95"), ("total_variation", "total_variation_ci95")):
        columns = zip(table["position"], table[name], table[interval], strict=True)
        rows += [[name, position, value, *ci95] for position, value, ci95 in columns]
    for entry in result["state_norms"]:
        for name in ("state", "normalizer"):
            columns = zip(table["position"], entry[name], strict=True)
            rows += [[f"{name} of layer {entry['layer']}", position, value, "", ""] for position, value in columns]
    return rows
