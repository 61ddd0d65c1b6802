"""Log-likelihoods of continuations of any lengths are those of each row alone, by few programs."""

import jax
import numpy as np
import pytest

from sympow_jax.evals.continuations import ContinuationScorer
from sympow_jax.models.model import Model, resolve_implementation
from tests.models.small import VOCAB, moved, tiny_config


def model_of(variant: str, *flags: str):
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    return model, jax.device_put(moved(model.init(jax.random.key(0)), 0.1)), jax.jit(model.logits)


def alone(logits_of, params, row, count, padded=100):
    """The definition, in float64, from the logits of one whole row; what pads it comes after it."""
    inputs = np.pad(row[:-1], (0, padded - len(row) + 1))
    logits = np.asarray(logits_of(params, inputs[None])[0], np.float64)[0, len(row) - 1 - count : len(row) - 1]
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = row[-count:]
    return logp[np.arange(count), targets].sum(), bool((logits.argmax(axis=1) == targets).all())


def with_greedy_end(logits_of, params, row):
    """`row` and the three tokens that the model finds most likely after it."""
    for _ in range(3):
        inputs = np.pad(row, (0, 100 - len(row)))[None]
        row = np.append(row, np.asarray(logits_of(params, inputs)[0])[0, len(row) - 1].argmax()).astype(np.int32)
    return row


VARIANTS = [
    "conformal_sympow",
    *(pytest.param(v, marks=pytest.mark.slow) for v in ("softmax_rope", "softmax_absolute")),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_any_lengths_are_scored_as_each_alone(variant):
    flags = ("position.max_length=100",) if variant == "softmax_absolute" else ()
    model, params, logits_of = model_of(variant, *flags)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (2, 9, 33, 70, 98, 100)]
    rows.append(with_greedy_end(logits_of, params, rows[1]))
    counts = [1, 8, 5, 70 - 1, 20, 3, 3]
    scorer = ContinuationScorer(model, params, batch_size=2, chunk_size=32)
    found = scorer.scores(rows, counts)
    for row, count, (total, greedy) in zip(rows, counts, found, strict=True):
        want, most_likely = alone(logits_of, params, row, count)
        np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-4)
        assert greedy == most_likely
    assert found[-1][1] and not all(greedy for _, greedy in found)
    assert scorer.num_programs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sympow", "softmax_rope"])
def test_24_lengths_compile_few_programs(variant):
    model, params, _ = model_of(variant)
    scorer = ContinuationScorer(model, params, batch_size=4, chunk_size=64)
    scorer.scores([np.arange(n, dtype=np.int32) % VOCAB for n in range(2, 600, 25)], [1] * 24)
    assert scorer.num_programs <= 8


@pytest.mark.slow
def test_dynamic_ntk_scales_to_each_row():
    model, params, logits_of = model_of("softmax_rope", "position.scaling=dynamic_ntk", "position.original_length=16")
    rows = [np.arange(n, dtype=np.int32) % VOCAB for n in (20, 50, 50)]
    found = ContinuationScorer(model, params).scores(rows, [4, 4, 7])
    for row, count, (total, _) in zip(rows, (4, 4, 7), found, strict=True):
        np.testing.assert_allclose(
            total, alone(logits_of, params, row, count, padded=len(row) - 1)[0], rtol=1e-5, atol=1e-4
        )


def test_a_row_without_context_is_refused():
    model, params, _ = model_of("conformal_sympow")
    with pytest.raises(ValueError, match="row 1: 3 tokens of 3 are to be scored, legal are 1 to 2"):
        ContinuationScorer(model, params).scores([np.arange(3)] * 2, [1, 3])
