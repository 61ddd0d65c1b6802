"""Losses and answers on any mesh are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.evals.files import write_json
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.evals.retrieval import Matcher
from sympow_jax.evals.streaming import Scorer
from sympow_jax.loading import load_step
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from tests.evals.toy import make_store
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
