"""Losses and answers on any mesh are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.evals.files import write_json
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.evals.remembrance import remembrance
from sympow_jax.evals.retrieval import Matcher
from sympow_jax.evals.streaming import Scorer
from sympow_jax.input_pipeline.tasks.passkey import Needle
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from sympow_jax.loading import load_step
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from tests.evals.toy import Bigram, CountedStore, make_store
from tests.models.small import VOCAB, moved, tiny_config

MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "seq": 4}]
LINEAR = ("conformal_sympow", "based")


def models(variant: str, *flags: str):
    """A function from a mesh to a model and its parameters, in the chunked form where the kernel is linear."""
    form = ("attention.implementation=chunked",) if variant in LINEAR else ()
    config = resolve_implementation(tiny_config(variant, *form, *flags))
    params = moved(Model(config, VOCAB).init(jax.random.key(0)), 0.05)

    def on(sizes: dict[str, int] | None):
        if sizes is None:
            return Model(config, VOCAB), params
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes)
        return Model(config, VOCAB, mesh), jax.device_put(params, sharding.tree_shardings(params, mesh))

    return on


def test_a_stream_over_rows_heads_and_time_has_the_losses_of_one_device():
    """Three chunks, so that a state is passed on; three windows, which two shards of rows do not divide."""
    on = models("conformal_sympow", "model.num_layers=1")
    targets = np.random.default_rng(0).integers(0, VOCAB, (3, 44)).astype(np.uint16)

    def sums(sizes, chunk_size):
        options = {"chunk_size": chunk_size, "batch_size": 4, "num_windows": 3}
        return Scorer(*on(sizes), bos_id=VOCAB - 1, **options).cumulative(targets, [1, 16, 30, 44])

    want = sums(None, 16)
    np.testing.assert_allclose(sums({"data": 2, "tensor": 2, "seq": 2}, 8), want, rtol=1e-6)


@pytest.mark.parametrize("length", [8, 16])  # which every shard of rows reads two of at once, and one
def test_a_window_is_read_by_the_same_shard_of_rows_whatever_its_length(length):
    """A process reads its own documents once, and scores windows of several lengths of them."""
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | {"data": 2, "fsdp": 2})
    model = dataclasses.replace(Bigram(streams_constant=False), mesh=mesh)
    scorer = Scorer(model, np.ones((9, 9), np.float32), bos_id=0, chunk_size=8, batch_size=2, num_windows=7)
    step, placed = scorer._step, []

    def recorded(params, tokens, state, length):
        placed.append(tokens)
        return step(params, tokens, state, length)

    scorer._step = recorded
    targets = np.repeat(np.arange(1, 8, dtype=np.uint16)[:, None], length, axis=1)
    np.testing.assert_array_equal(scorer.cumulative(targets, [length]), np.full((7, 1), length))
    seen = {block: set() for block in range(4)}
    for tokens in placed:
        for shard in tokens.addressable_shards:
            rows = np.asarray(shard.data)
            seen[shard.index[0].start // len(rows)] |= {*rows[:, 1:].ravel().tolist()}
    assert len(placed) == length // 8
    assert [found - {0} for found in seen.values()] == [{1, 2}, {3, 4}, {5, 6}, {7}]


def test_a_process_reads_the_documents_of_its_own_rows(monkeypatch):
    """As one that holds the second of four blocks of rows; the others' loss is not that of their documents."""
    monkeypatch.setattr(sharding.mesh, "row_blocks", lambda mesh: ([1], 4))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    assert sharding.held_rows(mesh, 7).tolist() == [False, False, True, True, False, False, False]
    store = CountedStore(**vars(make_store(num_documents=7, length=40, vocab=8)))
    model = dataclasses.replace(Bigram(), mesh=mesh)
    options = {"lengths": [8, 16], "train_length": 8, "num_targets": 4, "num_documents": 7, "batch_size": 7}
    length_generalisation(model, np.ones((9, 9), np.float32), store, **options)
    assert store.rows_read == [2, 3]
    store.rows_read.clear()
    config = resolve_implementation(tiny_config("softmax_nope", "model.num_layers=1"))
    plain = Model(config, VOCAB)
    options = {"length": 16, "train_length": 8, "num_documents": 7, "batch_size": 7, "num_targets": 4}
    remembrance(Model(config, VOCAB, mesh), plain.init(jax.random.key(0)), store, **options)
    assert store.rows_read == [2, 3, 3, 4]  # and the documents that take the place of what precedes
    asked = dataclasses.replace(make_store(num_documents=3, length=400, vocab=256), tokenizer=load_tokenizer("byte"))
    needle = Needle(300, CountedStore(**vars(asked)), held=lambda count: sharding.held_rows(mesh, count))
    mine, whole = needle.batch(0, 0, 8), Needle(300, asked).batch(0, 0, 8)
    assert len(needle.store.rows_read) == 2
    for name, values in whole.items():
        np.testing.assert_array_equal(mine[name][2:4], values[2:4])
    np.testing.assert_array_equal(mine["loss_mask"], whole["loss_mask"])


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_rope", "softmax_fire", "fox", "conformal_sympow", "based"])
def test_every_mesh_has_the_sums_of_one_device(variant):
    """Five documents, which no mesh divides; windows that are no multiple of chunks and shards."""
    on, store = models(variant), make_store(num_documents=5, length=100, vocab=VOCAB - 1)
    options = {"lengths": [24, 50, 100], "train_length": 24, "num_targets": 12, "num_documents": 5}
    options |= {"window": 40, "stride": 20, "chunk_size": 16, "batch_size": 2}
    _, want = length_generalisation(*on(None), store, **options)
    for sizes in MESHES:
        _, found = length_generalisation(*on(sizes), store, **options)
        for name in want:
            if name.endswith("_sums"):
                np.testing.assert_allclose(found[name], want[name], rtol=1e-6, err_msg=f"{sizes} {name}")
            else:
                np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_fire", "conformal_sympow", "based"])
def test_every_mesh_has_the_answers_of_one_device(variant):
    """Read at once and through the state; of three examples, with the answers of one device as the targets."""
    on = models(variant)
    inputs = np.random.default_rng(0).integers(0, VOCAB, (3, 50)).astype(np.int32)
    model, params = on(None)
    targets = np.array(jax.jit(model.logits)(params, inputs)[0].argmax(-1), np.int32)
    targets[:, ::3] += 1
    asked = np.ones(targets.shape, bool)
    asked[:, 16:32] = False  # a chunk without a question
    for sizes in (None, *MESHES):
        for chunk_size in (16, 64):
            right = Matcher(*on(sizes), chunk_size=chunk_size).right(inputs, targets, asked)
            wanted = asked & (np.arange(50) % 3 > 0)
            assert (right == wanted).mean() > 0.99, (sizes, chunk_size)


@pytest.mark.slow
@pytest.mark.quick
def test_a_checkpoint_of_any_mesh_is_measured_on_every_other(tmp_path):
    """Saved as training saves it, read as eval.py reads it; each device holds its part of each parameter."""
    on, targets = models("conformal_sympow"), np.random.default_rng(0).integers(0, VOCAB, (2, 32)).astype(np.uint16)
    found = []
    for number, saved_on in enumerate((None, *MESHES)):
        workdir, (model, params) = tmp_path / str(number), on(saved_on)
        write_json(workdir / "config.json", dataclasses.asdict(model.config))
        write_json(workdir / "data.json", {"vocab_size": VOCAB})
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            checkpointer.save(1, {"params": params}, metadata={})
        for sizes in (None, *MESHES):
            mesh = on(sizes)[0].mesh
            model, params, _ = load_step(str(workdir), mesh=mesh)
            if sizes is not None and "fsdp" in sizes:
                table = params["embedding"]["embedding"]
                assert table.addressable_shards[0].data.size == table.size / 8
            options = {"chunk_size": 8, "batch_size": 1, "num_windows": 2}
            found.append(Scorer(model, params, bos_id=VOCAB - 1, **options).cumulative(targets, [5, 32]))
    np.testing.assert_allclose(found[1:], np.broadcast_to(found[0], (15, 2, 2)), rtol=1e-6)
