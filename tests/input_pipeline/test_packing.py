import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from sympow_jax import evaluate
from sympow_jax.config import resolve
from sympow_jax.input_pipeline import make_batches, open_packed_store
from sympow_jax.input_pipeline.packing import pack
from sympow_jax.input_pipeline.prepare.build import Request, build
from sympow_jax.input_pipeline.prepare.sources import Document
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.models.model import Model, resolve_implementation

pytestmark = pytest.mark.quick


class Texts:
    """Documents given as a list."""

    def __init__(self, *texts):
        self.texts = texts

    def describe(self):
        return {"kind": "test", "count": len(self.texts)}

    def documents(self):
        for i, text in enumerate(self.texts):
            yield Document(str(i), text)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seq_len=st.integers(1, 12))
def test_pack_against_the_obvious_loop(lengths, seq_len):
    documents = [np.arange(n) + 10 * i for i, n in enumerate(lengths)]
    stream = np.concatenate(documents)
    offsets = np.cumsum([0, *lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for start in range(0, len(stream), seq_len):
        tokens = np.zeros(seq_len, np.int64)
        part = stream[start : start + seq_len]
        tokens[: len(part)] = part
        batch = pack(tokens, offsets, start, bos_id=99)
        segment, position = 0, 0
        for t in range(seq_len):
            if start + t >= len(stream):
                expected = (99, 0, 0, 0, 0.0)
            else:
                new = t == 0 or owner[start + t] != owner[start + t - 1]
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
                expected = (99 if new else stream[start + t - 1], stream[start + t], segment, position, 1.0)
            found = tuple(batch[name][t] for name in ("inputs", "targets", "segment_ids", "positions", "loss_mask"))
            assert found == expected


@pytest.fixture
def packed(tmp_path):
    texts = ["first document", "b", "the third one, rather longer than a window", "end"]
    folder = build(
        Texts(*texts),
        tmp_path / "packed",
        tokenizer=ByteTokenizer(),
        request=Request(documents="packed", heldout_fraction=0),
    )
    return open_packed_store(str(folder / "train.zarr"), seq_len=16), texts


def test_a_packed_store_holds_each_document_once(packed):
    store, texts = packed
    batches = make_batches(store, seq_len=16, batch_size=store.num_documents)
    batch = batches[0]
    assert batch["inputs"].shape == (-(-sum(map(len, texts)) // 16), 16)
    stream = bytes(batch["targets"][batch["loss_mask"] > 0].tolist()).decode()
    found = [stream[a:b] for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    assert sorted(found) == sorted(texts)
    described = batches.describe(0)
    assert described[0]["documents"][0] == 0 and described[-1]["documents"][-1] == 3
    np.testing.assert_array_equal(store.clusters, [entry["documents"][0] for entry in described])


def test_hosts_share_a_packed_batch(packed):
    store, _ = packed
    whole = make_batches(store, seq_len=16, batch_size=4, order="shuffled_chunks", seed=2)
    for step in range(5):
        parts = [
            make_batches(
                store, seq_len=16, batch_size=4, order="shuffled_chunks", seed=2, process_index=i, process_count=2
            )[step]
            for i in range(2)
        ]
        for name, values in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_windows_of_another_length_are_refused(packed):
    with pytest.raises(ValueError, match=r"data.seq_len = 8: .* was opened for windows of 16"):
        make_batches(packed[0], seq_len=8, batch_size=1)


def test_packed_rows_are_not_evaluated_as_long_documents(packed, tmp_path):
    config = resolve(default.get_config())
    workdir, address = str(tmp_path), packed[0].address
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    request = evaluate.EvaluationRequest(workdir, "length_generalisation", (16,), address, "x", num_documents=1)
    with pytest.raises(ValueError, match="its rows are packed or padded documents"):
        evaluate.evaluate(request)


def test_broken_offsets_are_refused(packed):
    store, _ = packed
    path = f"{store.address}/offsets.int64"
    with open(path, "r+b") as file:
        file.truncate(16)
    with pytest.raises(ValueError, match=r"offsets\.int64 does not rise from 0 to 60"):
        open_packed_store(store.address, seq_len=16)


@pytest.mark.parametrize("offsets", [[1, 15, 60], [0, 30, 20, 60], [0, 15, 15, 60], [0, 15, 59], [60]])
def test_offsets_that_do_not_rise_from_0_to_the_end_are_refused(packed, offsets):
    store, _ = packed
    pathlib.Path(store.address, "offsets.int64").write_bytes(np.asarray(offsets, "<i8").tobytes())
    with pytest.raises(ValueError, match=r"offsets\.int64 does not rise from 0 to 60"):
        open_packed_store(store.address, seq_len=16)


@functools.cache
def small_model(variant):
    c = default.get_config(variant)
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 1, 32, 64
    c.model.num_heads, c.model.head_dim = 2, 16
    c.data.seq_len = 48
    c.attention.chunk_size = 8
    model = Model(resolve_implementation(resolve(c)), vocab_size=257)
    return model, model.init(jax.random.key(0)), jax.jit(model.nll)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("softmax_rope", marks=pytest.mark.slow),
        pytest.param("softmax_fire", marks=pytest.mark.slow),
        pytest.param("conformal_sympow", marks=pytest.mark.slow),
        pytest.param("sympow", marks=pytest.mark.slow),
        pytest.param("fox", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_have_the_loss_of_each_alone(variant):
    """Windows of 48, documents that end at 5, 12, 30 and 60: the last one is cut, and padding follows."""
    _, params, nll = small_model(variant)
    rng = np.random.default_rng(1)
    # away from their first values, at which some parameters do nothing
    params = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
    stream = np.concatenate([rng.integers(0, 256, 60), np.zeros(36, np.int64)])
    offsets = np.array([0, 5, 12, 30, 60])
    windows = [pack(stream[start : start + 48], offsets, start, bos_id=256) for start in (0, 48)]
    batch = {name: np.stack([window[name] for window in windows]) for name in windows[0]}
    found, _ = nll(
        params, batch["inputs"], batch["targets"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    found = np.asarray(found)
    pieces = [(0, 0, 5), (0, 5, 12), (0, 12, 30), (0, 30, 48), (1, 48, 60)]
    for window, start, stop in pieces:
        targets = stream[None, start:stop].astype(np.int32)
        # alone, padded at the end to one shape, which causality makes harmless
        targets = np.pad(targets, ((0, 0), (0, 48 - (stop - start))))
        inputs = np.concatenate([np.full((1, 1), 256, np.int32), targets[:, :-1]], axis=1)
        alone, _ = nll(params, np.repeat(inputs, 2, 0), np.repeat(targets, 2, 0))
        place = start - 48 * window
        np.testing.assert_allclose(
            found[window, place : place + stop - start], np.asarray(alone)[0, : stop - start], rtol=2e-5, atol=2e-5
        )
