"""Effective remembrance and state norms equal their definitions, and nothing beyond a model's reach is remembered."""

import csv

import jax
import numpy as np
import pytest

from sympow_jax.evals import files
from sympow_jax.evals.remembrance import CSV_HEADER, csv_rows, other_documents, remembrance, replaced_before
from sympow_jax.evals.state_norms import linear_layers
from sympow_jax.models.model import Model, resolve_implementation
from tests.evals.test_evaluation_meshes import MESHES, models
from tests.evals.toy import make_store
from tests.models.small import VOCAB, moved, tiny_config

OPTIONS = {"length": 40, "train_length": 24, "num_documents": 3, "num_targets": 8}
CONTEXT = 32


def store(num_documents: int = 3, num_clusters: int = 2):
    """Documents of which the last token of the vocabulary, BOS, is no part."""
    return make_store(num_documents, 44, num_clusters, vocab=VOCAB - 1)


def model_of(variant: str, *flags: str):
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    return model, moved(model.init(jax.random.key(0)), 0.1)


@pytest.mark.parametrize(("window", "chunk_size"), [(5, 12), (8, 64)])
def test_nothing_beyond_the_reach_of_a_window_is_remembered(window, chunk_size):
    """One layer that sees `window` tokens: exactly 0 where that many are kept before the first target."""
    flags = ("model.num_layers=1", "attention.layer_pattern=window", f"attention.window={window}")
    result, arrays = remembrance(*model_of("softmax_rope", *flags), store(), chunk_size=chunk_size, **OPTIONS)
    table = result["remembrance"]
    beyond = CONTEXT - np.asarray(table["position"]) >= window
    assert (~beyond).sum() == 4  # 0, 1, 2 and 4 tokens are kept
    for name in ("difference", "total_variation"):
        values = np.asarray(table[name])
        assert (values[beyond] == 0).all() and (values[~beyond] != 0).all(), name
    assert (arrays["replaced_sums"][:, ~beyond] != arrays["true_sums"][:, None]).all()
    assert result["state_norms"] == [] and arrays["state_norms"].shape[2] == 0


def by_hand(model, params, rows, arrays):
    """(loss, loss with replaced tokens, total variation): means over targets and documents, from whole passes."""
    bos = np.full((len(rows.tokens), 1), rows.bos_id)
    n, logits = OPTIONS["num_targets"], jax.jit(lambda params, inputs: model.logits(params, inputs)[0])

    def log_probabilities(tokens):
        inputs = np.concatenate([bos, tokens[:, :-1]], axis=1).astype(np.int32)
        found = np.asarray(logits(params, inputs), np.float64)[:, -n:]
        return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))

    own = rows.tokens[arrays["document_ids"], : OPTIONS["length"]].astype(np.int64)
    targets = own[:, -n:, None]
    true = log_probabilities(own)
    changes, variations = [], []
    for position in arrays["position"]:
        changed = own.copy()
        changed[:, :position] = rows.tokens[arrays["donor_ids"], :position]
        found = log_probabilities(changed)
        changes.append((np.take_along_axis(true, targets, 2) - np.take_along_axis(found, targets, 2)).mean())
        variations.append(np.abs(np.exp(found) - np.exp(true)).sum(axis=-1).mean() / 2)
    return -np.take_along_axis(true, targets, 2).mean(), np.asarray(changes), np.asarray(variations)


def step_by_step(model, params, rows, arrays):
    """Root mean squares of the states after each input of a stream of single tokens, [position, layer, 2]."""
    own = rows.tokens[arrays["document_ids"], :CONTEXT]
    inputs = np.concatenate([np.full((len(own), 1), rows.bos_id), own], axis=1).astype(np.int32)
    step = jax.jit(lambda params, token, state: model.logits(params, token, state=state)[1])
    state, found = model.initial_state(len(own), CONTEXT), []
    for position in range(CONTEXT):
        state = step(params, inputs[:, position : position + 1], state)
        layers = [layer.get("kernel") for name in sorted(state) if name != "offset" for layer in state[name]]
        kernels = [kernel for kernel in layers if hasattr(kernel, "normalizer")]
        found.append([[_size(kernel.state), _size(kernel.normalizer)] for kernel in kernels])
    return np.asarray(found)[arrays["position"] - 1]


def _size(x) -> float:
    squares = np.asarray(x, np.float64) ** 2
    return np.sqrt(squares.reshape(len(squares), -1).mean(axis=1)).mean()


def check_definition(variant: str, chunk_size: int, *flags: str) -> None:
    model, params = model_of(variant, *flags)
    result, arrays = remembrance(model, params, store(), chunk_size=chunk_size, batch_size=2, **OPTIONS)
    nll, changes, variations = by_hand(model, params, store(), arrays)
    table = result["remembrance"]
    assert result["loss"]["nll"] == pytest.approx(nll, rel=1e-5)
    np.testing.assert_allclose(table["difference"], changes, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(table["total_variation"], variations, rtol=1e-3, atol=1e-6)
    assert np.abs(changes).max() > 0.01 and variations.max() > 0.01
    assert [entry["layer"] for entry in result["state_norms"]] == linear_layers(model.config)
    norms = step_by_step(model, params, store(), arrays)
    for entry, want in zip(result["state_norms"], np.moveaxis(norms, 1, 0), strict=True):
        np.testing.assert_allclose(entry["state"], want[:, 0], rtol=2e-5)
        np.testing.assert_allclose(entry["normalizer"], want[:, 1], rtol=2e-5)


def test_a_linear_model_has_the_numbers_of_the_definition():
    """Read in chunks through the state, three documents two at a time."""
    check_definition("conformal_sympow", 12, "model.num_layers=1")


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["hybrid", "based", "conformal_vector_sympow", "softmax_fire"])
def test_every_kind_of_model_has_the_numbers_of_the_definition(variant):
    """Hybrids with a cache, windows and convolutions; layers without a finite state have no norms."""
    check_definition(variant, 12)


def test_a_kernel_that_cannot_be_streamed_has_no_norms():
    config = tiny_config("sympow", "attention.position=t5", "attention.implementation=blockwise")
    assert linear_layers(config) == []
    assert linear_layers(tiny_config("hybrid")) == [0, 2]


def check_meshes(variant: str, meshes, *flags: str) -> None:
    on, options = models(variant, *flags), {"chunk_size": 16, "batch_size": 2, **OPTIONS}
    _, want = remembrance(*on(None), store(), **options)
    for sizes in meshes:
        _, found = remembrance(*on(sizes), store(), **options)
        for name, array in want.items():
            if name == "variation_sums":
                np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-5, err_msg=f"{sizes} {name}")
            elif name.endswith(("_sums", "_norms")):
                np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=f"{sizes} {name}")
            else:
                np.testing.assert_array_equal(found[name], array)


def test_two_devices_have_the_numbers_of_one():
    check_meshes("conformal_sympow", [{"data": 2}], "model.num_layers=1")


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_fire", "conformal_sympow", "based", "hybrid"])
def test_every_mesh_has_the_numbers_of_one_device(variant):
    check_meshes(variant, MESHES)


@pytest.mark.parametrize("context", [1, 2, 3, 31, 32, 63, 64, 100, 1000, 3840, 65280, 2**20])
def test_positions_are_dense_near_both_ends_of_the_context(context):
    positions = replaced_before(context)
    assert positions == sorted(set(positions)) and positions[-1] == context and positions[0] > 0
    assert len(positions) <= 2 * np.log2(context) + 4
    if context >= 64:
        kept = [context - position for position in positions]
        step = kept[-2]
        assert step <= 32 and context / step >= 32 and {2 * step, 4 * step, 8 * step} <= {*kept}
        assert all(count % step == 0 for count in kept) and positions[0] <= 2 * step


def test_tokens_are_replaced_by_those_of_the_next_document_of_another_source():
    assert other_documents(np.asarray([5, 5, 7, 5, 9])).tolist() == [2, 2, 3, 4, 0]
    assert other_documents(np.asarray([5, 5, 5])).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "documents", "message"),
    [
        ({"length": 1}, 3, "lengths: 1 tokens, .* from 2 to that"),
        ({"length": 45}, 3, "lengths: 45 tokens, and the store's documents have 44"),
        ({"num_documents": 1}, 3, "num_documents 1, of 3 .*give at least 2"),
        ({}, 1, "num_documents 3, of 1 that have 40 tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_compiled(changes, documents, message):
    with pytest.raises(ValueError, match=message) as error:
        remembrance(Model(tiny_config("sympow"), VOCAB), {}, store(documents), **OPTIONS | changes)
    assert "\n" not in str(error.value)


def test_curves_are_a_table_too(tmp_path):
    result, _ = remembrance(*model_of("softmax_nope", "model.num_layers=1"), store(num_clusters=1), **OPTIONS)
    norms = {"layer": 1, "state": result["remembrance"]["difference"], "normalizer": result["remembrance"]["position"]}
    files.write_csv(tmp_path / "x.csv", CSV_HEADER, csv_rows(result | {"state_norms": [norms]}))
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    curves = {name: [row for row in rows if row["curve"] == name] for name in {row["curve"] for row in rows}}
    assert curves.keys() == {"difference", "total_variation", "state of layer 1", "normalizer of layer 1"}
    for name in ("difference", "total_variation"):
        assert [int(row["position"]) for row in curves[name]] == result["remembrance"]["position"]
        assert [float(row["value"]) for row in curves[name]] == result["remembrance"][name]
        assert all(row["low"] == row["high"] == "" for row in curves[name])  # one source: no interval
