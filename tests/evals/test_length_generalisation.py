import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.evals import files
from sympow_jax.evals.length_generalisation import bin_edges, length_generalisation
from sympow_jax.evals.length_summary import CSV_HEADER, csv_rows, default_lengths
from sympow_jax.evals.paired import paired_difference
from sympow_jax.evals.streaming import Scorer
from tests.evals.toy import Bigram, RunningCount, make_store

LENGTHS = [40, 80, 300]
OPTIONS = dict(lengths=LENGTHS, train_length=40, num_targets=16, num_documents=7)


def losses_of(model, params, store, rows, start, stop):
    """The definition: one call over the window, in float64."""
    targets = np.asarray(store.tokens[rows, start:stop], np.int32)
    inputs = np.concatenate([np.full((len(rows), 1), store.bos_id, np.int32), targets[:, :-1]], axis=1)
    return np.asarray(model.nll(params, jnp.asarray(inputs), jnp.asarray(targets))[0], np.float64)


def case(name: str, streams: bool):
    if name == "bigram":
        return Bigram(streams), jnp.asarray(np.random.default_rng(2).random((8, 8)), jnp.float32)
    return RunningCount(streams), jnp.linspace(1.0, 3.0, 7, dtype=jnp.float32)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("name", ["bigram", "count"])
@pytest.mark.parametrize("chunk_size", [32, 300])
def test_equals_its_definition(name, streams, chunk_size):
    model, params = case(name, streams)
    store = make_store()
    result, arrays = length_generalisation(model, params, store, chunk_size=chunk_size, batch_size=3, **OPTIONS)
    rows = arrays["document_ids"]
    assert len(np.unique(rows)) == 7
    whole = losses_of(model, params, store, rows, 0, 300)
    for entry in result["lengths"]:
        np.testing.assert_allclose(entry["nll"], whole[:, : entry["length"]].mean(), rtol=1e-6)
        assert entry["num_tokens"] == 7 * entry["length"]
    for entry in result["same_target"]:
        window = losses_of(model, params, store, rows, 300 - entry["context"], 300)
        np.testing.assert_allclose(entry["nll"], window[:, -16:].mean(), rtol=1e-6)
    edges = arrays["bin_edges"]
    expected = [whole[:, a:b].mean() for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(result["contextwise"]["nll"], expected, rtol=1e-6)
    np.testing.assert_allclose(arrays["length_sums"][:, -1], whole.sum(1), rtol=1e-6)


def test_same_target_scores_the_same_tokens_under_every_context():
    """A model that sees one token back has the same loss on them whatever the context."""
    model, params = case("bigram", True)
    result, _ = length_generalisation(model, params, make_store(), chunk_size=32, **OPTIONS)
    values = [entry["nll"] for entry in result["same_target"]]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    np.testing.assert_allclose(result["same_target_change"]["difference"], 0.0, atol=1e-6)
    assert result["same_target_change"]["from_context"] == 40


@pytest.mark.parametrize(("train_length", "reference"), [(39, 40), (40, 40), (79, 40), (80, 80), (299, 80), (500, 300)])
def test_changes_are_from_the_longest_context_within_the_training_length(train_length, reference):
    model, params = case("count", True)
    options = OPTIONS | {"train_length": train_length, "num_documents": 2}
    change = length_generalisation(model, params, make_store(), **options)[0]["same_target_change"]
    assert change["from_context"] == reference
    assert change["difference"][LENGTHS.index(reference)] == 0.0 and np.count_nonzero(change["difference"]) == 2


def test_targets_are_at_most_half_of_the_longest_context():
    model, params = case("count", True)
    result, arrays = length_generalisation(model, params, make_store(), **(OPTIONS | {"num_targets": 200}))
    assert result["num_targets"] == 150 and (arrays["same_target_counts"] == 150).all()


@pytest.mark.parametrize("num_targets", [16, 37, 150])
def test_a_window_shorter_than_twice_the_targets_moves_by_half_of_itself(num_targets):
    """Every target counts once, with at least half of the context before it."""
    model, params = case("count", True)
    options = OPTIONS | {"num_targets": num_targets}
    result, arrays = length_generalisation(model, params, make_store(), chunk_size=32, **options)
    for entry in result["same_target"]:
        context, total, end = entry["context"], 0.0, 300
        step = min(num_targets, context // 2)
        while end > 300 - num_targets:
            window = losses_of(model, params, make_store(), arrays["document_ids"], max(0, end - context), end)
            total += window[:, -min(step, end - 300 + num_targets) :].sum()
            end -= step
        np.testing.assert_allclose(entry["nll"], total / (7 * num_targets), rtol=1e-6)


def test_what_is_gained_from_context_is_the_fall_of_the_same_target_loss():
    model, params = case("count", True)
    options = OPTIONS | {"lengths": [5, 20, 80, 300], "train_length": 80}
    result, _ = length_generalisation(model, params, make_store(), **options)
    loss = {entry["context"]: entry["nll"] for entry in result["same_target"]}
    first, second = result["gained_from_context"]
    assert (first["from_context"], first["to_context"]) == (5, 80)
    assert (second["from_context"], second["to_context"]) == (80, 300)
    for row in (first, second):
        np.testing.assert_allclose(row["gain"], loss[row["from_context"]] - loss[row["to_context"]], rtol=1e-9)
        assert row["ci95"][0] <= row["gain"] <= row["ci95"][1]
    at_once = length_generalisation(model, params, make_store(), **options | {"lengths": [80]})[0]
    assert at_once["gained_from_context"] == [] and at_once["remembered_share"] is None
    share = result["remembered_share"]
    np.testing.assert_allclose(share["share"], 1 + second["gain"] / first["gain"], rtol=1e-9)
    assert share["ci95"][0] <= share["share"] <= share["ci95"][1]


def test_an_evaluation_that_names_no_context_begins_below_the_trained_one():
    assert default_lengths(512, (512, 1024)) == (32, 128, 512, 1024)
    assert default_lengths(8, (8, 16)) == (1, 2, 8, 16)


def test_the_position_of_a_bin_is_the_mean_number_of_inputs_that_its_targets_have():
    model, params = case("count", True)
    result, arrays = length_generalisation(model, params, make_store(), **OPTIONS)
    bins = itertools.pairwise(arrays["bin_edges"].tolist())
    assert result["contextwise"]["position"] == [np.mean(range(start + 1, stop + 1)) for start, stop in bins]


def test_document_of_a_batch_does_not_depend_on_its_neighbours():
    model, params = case("count", True)
    store = make_store()
    _, first = length_generalisation(model, params, store, chunk_size=64, batch_size=2, **OPTIONS)
    _, second = length_generalisation(model, params, store, chunk_size=64, batch_size=5, **OPTIONS)
    np.testing.assert_allclose(first["bin_sums"], second["bin_sums"], rtol=1e-6)


def test_what_fits_a_chunk_is_read_without_a_state():
    class Counting(RunningCount):
        made = 0

        def initial_state(self, batch_size, max_length):
            type(self).made += 1
            return super().initial_state(batch_size, max_length)

    scorer = Scorer(Counting(), jnp.ones(8), bos_id=7, chunk_size=64, batch_size=2, num_windows=2)
    for length, made in ((64, 0), (65, 1)):
        (total,) = scorer.cumulative(np.zeros((1, length), np.uint16), [length])[:, 0]
        np.testing.assert_allclose(total, np.sum(1 / (2.0 + np.arange(length))), rtol=1e-6)
        assert Counting.made == made


def test_sums_are_float64():
    """A million equal float32 losses: a float32 accumulator would be off in the fourth digit."""
    store = make_store(num_documents=2, length=1 << 20, vocab=1)
    params = jnp.full((2, 2), 0.1, jnp.float32)
    result, _ = length_generalisation(
        Bigram(), params, store, lengths=[1 << 20], train_length=512, chunk_size=1 << 16, num_documents=2
    )
    np.testing.assert_allclose(result["lengths"][0]["nll"], float(np.float32(0.1)), rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class LengthTeller(Bigram):
    """Its loss is the length that it is told."""

    depends_on_length: bool = True

    def nll(self, params, inputs, targets, *, state=None, length=0):
        return jnp.full(inputs.shape, length, jnp.float32), state


def test_models_that_depend_on_it_are_told_the_length_of_the_window():
    result, _ = length_generalisation(LengthTeller(), {}, make_store(), chunk_size=32, **OPTIONS)
    assert [entry["nll"] for entry in result["same_target"]] == LENGTHS
    assert [entry["nll"] for entry in result["lengths"]] == LENGTHS
    assert set(result["contextwise"]["nll"]) == {300}


@pytest.mark.parametrize("streams", [True, False])
def test_a_loss_does_not_depend_on_the_longest_of_the_lengths(streams):
    """Under dynamic_ntk a pass over more tokens scores the first ones otherwise: each length has a pass of its own."""
    model, store = LengthTeller(streams), make_store()
    found = {}
    for lengths in ([40], [40, 80], [40, 300]):
        result, _ = length_generalisation(model, {}, store, **OPTIONS | {"lengths": lengths})
        found[lengths[-1]] = result
    assert [result["lengths"][0]["nll"] for result in found.values()] == [40.0] * 3
    assert [result["lengths"][-1]["nll"] for result in found.values()] == [40.0, 80.0, 300.0]
    assert [entry["nll"] for entry in found[300]["same_target"]] == [40.0, 300.0]


def test_sliding_window_scores_every_target_once():
    model, params = case("count", True)
    store = make_store()
    result, arrays = length_generalisation(model, params, store, chunk_size=32, window=64, stride=32, **OPTIONS)
    rows, total, scored = arrays["document_ids"], 0.0, 0
    for start in [*range(0, 300 - 64, 32), 300 - 64]:
        window = losses_of(model, params, store, rows, start, start + 64)
        total += window[:, scored - start :].sum()
        scored = start + 64
    sliding = result["sliding_window"]
    np.testing.assert_allclose(sliding["nll"], total / (7 * 300), rtol=1e-6)
    assert (sliding["window"], sliding["stride"], sliding["num_tokens"]) == (64, 32, 7 * 300)


@pytest.mark.parametrize("train_length, longest", [(512, 4096), (500, 4096), (512, 512), (512, 100), (1, 7)])
def test_bins_cover_every_position_once(train_length, longest):
    edges = bin_edges(train_length, longest)
    assert edges[0] == 0 and edges[-1] == longest and (np.diff(edges) > 0).all()
    assert train_length >= longest or train_length in edges
    assert len(edges) < 4 * np.log2(longest) + 8


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lengths=[512]), "512 exceeds the 300 tokens"),
        (dict(lengths=[]), "give positive numbers"),
        (dict(window=64, stride=65), "0 < stride <= window"),
        (dict(train_length=0), "train_length 0"),
    ],
)
def test_errors_are_one_line_that_names_the_field(changes, message):
    model, params = case("count", True)
    with pytest.raises(ValueError, match=message) as error:
        length_generalisation(model, params, make_store(), **(OPTIONS | changes))
    assert "\n" not in str(error.value)


def test_files_round_trip_and_carry_the_run(tmp_path):
    model, params = case("count", True)
    run = {"step": 7, "variant": "toy", "seed": 3, "dtype": "float32"}
    result, arrays = length_generalisation(model, params, make_store(num_clusters=1), run=run, **OPTIONS)
    path = files.write_result(tmp_path / "eval", "lengths", result, arrays)
    saved = json.loads(path.read_text())
    assert saved["lengths"][0]["ci95"] == [None, None]  # one source: no interval, and JSON has no NaN
    assert {key: saved[key] for key in ("step", "variant", "seed", "dtype")} == {
        key: run[key] for key in ("step", "variant", "seed", "dtype")
    }
    assert saved["data"]["store"] == "toy-store" and saved["data"]["digest"] == "toy"
    assert sorted(item.name for item in path.parent.iterdir()) == ["lengths.json", "lengths.npz"]
    for name, array in files.read_npz(path.with_suffix(".npz")).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_curves_are_a_table_too(tmp_path):
    model, params = case("count", True)
    result, _ = length_generalisation(model, params, make_store(num_clusters=1), **OPTIONS)
    files.write_csv(tmp_path / "x.csv", CSV_HEADER, csv_rows(result))
    header, *rows = [line.split(",") for line in (tmp_path / "x.csv").read_text().splitlines()]
    assert header == ["curve", "tokens", "nll", "low", "high"]
    assert [row[:2] for row in rows[:6]] == [[name, str(n)] for name in ("same_target", "prefix") for n in LENGTHS]
    bins = [row for row in rows if row[0] == "contextwise"]
    assert [float(row[1]) for row in bins] == result["contextwise"]["position"]
    assert [float(row[2]) for row in bins] == result["contextwise"]["nll"]
    assert all(row[3:] == ["", ""] for row in rows)  # one source: no interval


def test_paired_difference_sees_what_separate_intervals_hide():
    """A constant difference between two runs has an interval of width 0, though documents differ widely."""
    store = make_store(num_documents=40, num_clusters=20)
    model, params = case("count", True)
    options = OPTIONS | dict(num_documents=40)
    result, first = length_generalisation(model, params, store, **options)
    _, second = length_generalisation(model, params * 1.01, store, **options)
    paired = paired_difference(first, second)
    for label, table in (("length", "lengths"), ("context", "same_target")):
        for entry, own in zip(paired[table], result[table], strict=True):
            assert entry[label] == own[label]
            np.testing.assert_allclose(entry["difference"], 0.01 * own["nll"], rtol=1e-3)
            assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
            assert np.diff(entry["ci95"]) < 0.02 * np.diff(own["ci95"])
    assert paired["num_documents"] == 40 and len(paired["contextwise"]["difference"]) == len(
        result["contextwise"]["nll"]
    )


def test_paired_difference_refuses_different_stores():
    model, params = case("count", True)
    _, arrays = length_generalisation(model, params, make_store(), **OPTIONS)
    with pytest.raises(ValueError, match="digest"):
        paired_difference(arrays, arrays | {"digest": np.asarray("other")})
    with pytest.raises(ValueError, match="share no document"):
        paired_difference(arrays, arrays | {"document_ids": arrays["document_ids"] + 100})


def test_paired_difference_matches_documents_and_lengths():
    """The runs scored different sets of documents, at different lengths: only what both have is compared."""
    store = make_store(num_documents=40, num_clusters=20)
    model, params = case("count", True)
    _, first = length_generalisation(model, params, store, **(OPTIONS | dict(num_documents=40)))
    options = OPTIONS | dict(num_documents=25, lengths=[60, 80, 300], seed=1)
    _, second = length_generalisation(model, params, store, **options)
    paired = paired_difference(first, second)
    assert paired["num_documents"] == 25
    assert [entry["length"] for entry in paired["lengths"]] == [80, 300]
    for table in ("lengths", "same_target"):
        np.testing.assert_allclose([entry["difference"] for entry in paired[table]], 0.0, atol=1e-6)
    np.testing.assert_allclose(paired["contextwise"]["difference"], 0.0, atol=1e-6)
