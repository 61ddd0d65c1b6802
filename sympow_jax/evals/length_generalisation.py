"""Loss at contexts longer than the training length: same-target, per-position and prefix loss, with intervals.

Three questions, in nats per token over the same held-out documents (targets y_0, ..., y_{L-1}, L the longest length):

    same_target(c)  = mean of nll(y_t | BOS, y_{s-c}, ..., y_{t-1}) over the last `num_targets` t: the same targets
                      under growing left context c. The curve that decides whether more context helps. The window
                      ends at s = L, or, where it is shorter than twice the targets, at steps of half a window:
                      every target has c/2 to c tokens to its left.
    gained(a, b)    = same_target(a) - same_target(b): what the context from a to b is worth.
    contextwise(t)  = mean of nll(y_t | BOS, y_0, ..., y_{t-1}) over log-spaced bins of t.
    prefix(l)       = mean of that over t < l; its targets change with l (the perplexity curve of FoX).

A curve that does not rise up to L says nothing beyond L; one that does not fall below the trained context belongs to a
model that ignores it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sympow_jax.evals.length_summary import summarise
from sympow_jax.evals.streaming import LanguageModel, Scorer
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tokenizers import token_dtype

BOS_RULE = "the input before the first target of every window is BOS"
BINS_PER_OCTAVE = 4
NUM_TARGETS = 256
DOCUMENTS_AT_ONCE = 8  # on a device


def bin_edges(train_length: int, longest: int, *, bins_per_octave: int = BINS_PER_OCTAVE) -> np.ndarray:
    """Log-spaced bin edges 0 = e_0 < e_1 < ... < e_K = longest; the training length is an edge."""
    octaves = int(np.ceil(np.log2(max(train_length, longest)))) + 1
    powers = np.arange(-octaves * bins_per_octave, octaves * bins_per_octave + 1) / bins_per_octave
    grid = np.round(train_length * 2.0**powers).astype(np.int64)
    return np.unique(np.concatenate([[0], grid[grid < longest], [longest]]))


def choose_documents(num_available: int, num_documents: int, *, seed: int) -> np.ndarray:
    """Sorted rows of `num_documents` distinct documents; the same for every run that evaluates this store."""
    count = min(num_documents, num_available)
    return np.sort(np.random.default_rng(seed).permutation(num_available)[:count])


def read_documents(store: Store, rows: np.ndarray, length: int, held: np.ndarray | None = None) -> np.ndarray:
    """The first `length` tokens of each row, [N, length], unsigned; zeros in those that are not `held` [N] bool."""
    documents = np.zeros((len(rows), length), token_dtype(store.vocab_size))
    for place in range(len(rows)) if held is None else np.flatnonzero(held):
        documents[place] = store.read(slice(int(rows[place]), int(rows[place]) + 1), slice(0, length))[0]
    return documents


def length_generalisation(
    model: LanguageModel,
    params: Any,
    store: Store,
    *,
    lengths: Sequence[int],
    train_length: int,
    run: Mapping[str, Any] | None = None,
    num_documents: int = 48,
    num_targets: int = NUM_TARGETS,
    chunk_size: int = 512,
    batch_size: int = DOCUMENTS_AT_ONCE,
    window: int = 0,
    stride: int = 0,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluates a model at several lengths; returns what goes into eval/<name>.json and eval/<name>.npz.

    Args:
      model: streams through `nll(params, inputs, targets, state=state)`.
      params: its parameters.
      store: held-out documents of at least max(lengths) tokens.
      lengths: evaluated contexts, in tokens.
      train_length: the context of training.
      run: what identifies the run in the file: step, variant, seed, dtype, position_overrides.
      num_documents: documents scored (all of them if the store has fewer), chosen by `seed`.
      num_targets: final targets of the same-target curve; at most half of the longest length is used.
      chunk_size, batch_size: see Scorer.
      window, stride: when given, also scores the documents with windows of `window` tokens that advance by `stride`.
      seed: of the choice of documents and of the bootstrap.

    Raises:
      ValueError: a length is not positive or exceeds the documents, or window and stride do not fit.
    """
    lengths = sorted({int(length) for length in lengths})
    _check(lengths, store.document_length, train_length, window, stride)
    longest, num_targets = lengths[-1], max(1, min(num_targets, lengths[-1] // 2))
    rows = choose_documents(store.num_documents, num_documents, seed=seed)
    sizes = {"chunk_size": chunk_size, "batch_size": batch_size, "num_windows": len(rows)}
    scorer = Scorer(model, params, bos_id=store.bos_id, **sizes)
    edges = bin_edges(train_length, longest)
    counts = {"length": lengths, "same_target": [num_targets] * len(lengths), "bin": np.diff(edges)}
    if window:
        counts["sliding"] = [longest]
    groups = []
    for first in range(0, len(rows), scorer.batch_size):
        some = rows[first : first + scorer.batch_size]
        targets = read_documents(store, some, longest, scorer.held(len(some)))
        sums = _document_sums(scorer, targets, lengths, num_targets, edges)
        if window:
            sums["sliding"] = _sliding_sums(scorer, targets, window, stride)
        groups.append(sums)
    arrays = {
        "document_ids": rows,
        "clusters": np.asarray(store.clusters)[rows],
        "digest": np.asarray(str(store.digest)),
        "lengths": np.asarray(lengths),
        "num_targets": np.asarray(num_targets),
        "bin_edges": edges,
    }
    for name, count in counts.items():
        arrays[f"{name}_sums"] = np.concatenate([group[name] for group in groups])
        arrays[f"{name}_counts"] = np.tile(np.asarray(count, np.int64)[None], (len(rows), 1))
    header = result_header(run or {}, store, arrays, train_length)
    return header | summarise(arrays, train_length=train_length, window=window, stride=stride, seed=seed), arrays


def result_header(
    run: Mapping[str, Any], store: Store, arrays: Mapping[str, np.ndarray], train_length: int
) -> dict[str, Any]:
    """What a file says of the run and of the documents that were scored, before the curves."""
    return {key: run.get(key) for key in ("step", "variant", "seed", "dtype")} | {
        "train_length": train_length,
        "data": {"store": store.address, "digest": str(store.digest), "bos_rule": BOS_RULE},
        "position_overrides": run.get("position_overrides") or {},
        "num_documents": len(arrays["document_ids"]),
        "num_sources": len(np.unique(arrays["clusters"])),
        "num_targets": int(arrays["num_targets"]),
    }


def _check(lengths: list[int], document_length: int, train_length: int, window: int, stride: int) -> None:
    if not lengths or lengths[0] < 1:
        raise ValueError(f"lengths {lengths}: give positive numbers of tokens, e.g. 512,1024")
    if lengths[-1] > document_length:
        raise ValueError(
            f"lengths: {lengths[-1]} exceeds the {document_length} tokens of the store's documents; "
            "give shorter lengths or a store of longer documents"
        )
    if train_length < 1:
        raise ValueError(f"train_length {train_length}: give a positive number of tokens")
    if window and not (0 < stride <= window <= lengths[-1]):
        raise ValueError(
            f"window {window}, stride {stride}: need 0 < stride <= window <= {lengths[-1]}, the longest length"
        )


def _document_sums(
    scorer: Scorer, targets: np.ndarray, lengths: list[int], num_targets: int, edges: np.ndarray
) -> dict[str, np.ndarray]:
    """Loss sums of each document: one pass over the whole of it, and one over each shorter window at its end.

    Where the length of a pass changes what a model computes (dynamic_ntk), the sum over the first T targets is that of
    a pass over T tokens, whatever else is asked for; bins by position are those of the longest pass.
    """
    longest = targets.shape[1]
    points = np.unique([*edges, *lengths, longest - num_targets])
    cumulative = scorer.cumulative(targets, points)
    whole = dict(zip(points.tolist(), cumulative.T, strict=True))
    if scorer.depends_on_length:
        for length in lengths[:-1]:
            whole[length] = scorer.cumulative(targets[:, :length], [length])[:, 0]
    same_target = [_last_sums(scorer, targets, context, num_targets) for context in lengths[:-1]]
    same_target.append(whole[longest] - whole[longest - num_targets])
    return {
        "length": np.stack([whole[length] for length in lengths], axis=1),
        "same_target": np.stack(same_target, axis=1),
        "bin": np.diff(cumulative[:, np.searchsorted(points, edges)], axis=1),
    }


def _last_sums(scorer: Scorer, targets: np.ndarray, context: int, num_targets: int) -> np.ndarray:
    """Loss sum of the last `num_targets` targets of each document, each with context / 2 to context tokens before it.

    A window that holds twice the targets scores them all; a shorter one scores its second half and steps back by that.
    """
    longest, step = targets.shape[1], min(num_targets, max(1, context // 2))
    first, sums = longest - num_targets, np.zeros(len(targets))
    for end in range(longest, first, -step):
        start, scored = max(0, end - context), min(step, end - first)
        before, total = scorer.cumulative(targets[:, start:end], [end - start - scored, end - start]).T
        sums += total - before
    return sums


def _sliding_sums(scorer: Scorer, targets: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Loss sum of each document when windows of `window` tokens advance by `stride`, each target scored once.

    All targets but those of the first window have at least window - stride tokens of the document before them.
    """
    longest, scored, sums = targets.shape[1], 0, np.zeros(len(targets))
    for start in [*range(0, longest - window, stride), longest - window]:
        before, total = scorer.cumulative(targets[:, start : start + window], [scored - start, window]).T
        sums += total - before
        scored = start + window
    return sums[:, None]
