"""Context parallelism: outputs and gradients of one device, with documents across the edges of shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.layers import sequence_parallel
from sympow_jax.models.model import Model
from sympow_jax.sharding import exchange
from tests.models.small import VOCAB, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.quick]


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def packed_batch(B: int, T: int) -> dict[str, jax.Array]:
    """Documents of uneven lengths, one longer than two shards, and padding at the end of a row."""
    rng = np.random.default_rng(0)
    ids = np.ones((B, T), np.int32)
    ids[0] = np.cumsum(rng.random(T) < 6 / T) + 1
    ids[1, T // 8 + 3 :] = 2
    ids[1, -5:] = 0
    starts = np.maximum.accumulate(np.where(np.diff(ids, axis=1, prepend=-1) != 0, np.arange(T)[None], 0), axis=1)
    tokens = rng.integers(0, VOCAB, (2, B, T), np.int32)
    positions = (np.arange(T)[None] - starts).astype(np.int32)
    return {"inputs": tokens[0], "targets": tokens[1], "segment_ids": ids, "positions": positions}


def losses_and_gradients(config, mesh, batch):
    model = Model(config, VOCAB, mesh)
    params = Model(config, VOCAB).init(jax.random.key(0))
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def loss(params, batch):
        batch = dict(batch)
        nll = model.nll(params, batch.pop("inputs"), batch.pop("targets"), **batch)[0]
        return jnp.mean(nll), nll

    (_, nll), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return nll, gradients


@pytest.mark.parametrize(
    ("variant", "flags", "steps"),
    [
        ("conformal_sympow", "attention.implementation=chunked", False),
        ("conformal_sympow", "attention.implementation=chunked", True),
        ("conformal_vector_sympow", "attention.implementation=chunked", False),
        ("conformal_vector_sympow", "attention.implementation=chunked", True),
        ("conformal_vector_sympow", "attention.implementation=chunked position.rotation=scalar", True),
        ("selective_rope", "attention.implementation=auto", False),
        ("fox", "attention.implementation=auto", True),
        ("softmax_fire", "attention.implementation=auto", False),
        ("sympow_gated", "attention.position=fire", False),  # no state to pass on: always a ring
        ("based", "attention.implementation=chunked attention.sinks=true", False),
        ("hybrid", "attention.implementation=chunked", False),
    ],
)
def test_shards_of_a_sequence_give_the_outputs_and_gradients_of_one_device(monkeypatch, variant, flags, steps):
    """`steps` passes states in log2(P) steps, and keys around a ring, instead of one all-gather."""
    monkeypatch.setattr(exchange, "SMALL_GATHER", 0 if steps else 1 << 30)
    monkeypatch.setattr(sequence_parallel, "LARGEST_GATHER", 0 if steps else 1 << 30)
    config = tiny_config(variant, "data.seq_len=64", "attention.chunk_size=4", *flags.split())
    batch = packed_batch(2, 64)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "seq": 8 if steps else 4})
    want, want_gradients = losses_and_gradients(config, None, batch)
    nll, gradients = losses_and_gradients(config, mesh, batch)
    np.testing.assert_allclose(nll, want, rtol=2e-5, atol=2e-6)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert np.max(np.abs(a - b)) <= 3e-5 * np.max(np.abs(b)) + 1e-8, path


@pytest.mark.parametrize("variant", ["conformal_sympow", "conformal_vector_sympow"])
def test_a_stream_of_packed_documents_goes_on_between_shards(variant):
    """Losses and gradients of three calls of 16 tokens; a document of an earlier one ends, goes on, or fills them."""
    config = tiny_config(variant, "attention.chunk_size=4", "attention.implementation=chunked")
    batch = packed_batch(2, 48)
    batch["segment_ids"][1] = np.where(np.arange(48) < 37, 1, 2)
    batch = jax.tree.map(jnp.asarray, batch)
    params = Model(config, VOCAB).init(jax.random.key(0))

    def streamed(mesh):
        model = Model(config, VOCAB, mesh)

        def loss(params):
            state, found = model.initial_state(2, 48, differentiable=True), []
            for start in range(0, 48, 16):
                part = {name: x[:, start : start + 16] for name, x in batch.items() if name != "positions"}
                nll, state = model.nll(params, **part, state=state)
                found.append(nll)
            return jnp.mean(jnp.concatenate(found, axis=1)), (found, state)

        (_, (found, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return np.concatenate(found, axis=1), gradients, state

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 2, "seq": 4})
    (nll, gradients, state), (want, want_gradients, want_state) = streamed(mesh), streamed(None)
    np.testing.assert_allclose(nll, want, rtol=2e-5, atol=2e-6)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert np.max(np.abs(a - b)) <= 3e-5 * np.max(np.abs(b)) + 1e-8, path


def test_windows_of_a_stream_under_dynamic_ntk_scale_to_all_that_was_read():
    """Not each shard to what it has read."""
    flags = "position.scaling=dynamic_ntk position.factor=4.0 position.original_length=8 attention.window=4"
    config = tiny_config("softmax_rope", *flags.split(), "attention.layer_pattern=window")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 32)).astype(np.int32)
    params = jax.tree.map(lambda x: 3 * x, Model(config, VOCAB).init(jax.random.key(0)))

    def streamed(mesh):
        model = Model(config, VOCAB, mesh)
        there = params if mesh is None else jax.device_put(params, sharding.tree_shardings(params, mesh))
        return jax.jit(model.logits)(there, tokens, state=model.initial_state(2, 64))[0]

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "seq": 2})
    np.testing.assert_allclose(streamed(mesh), streamed(None), atol=2e-4, rtol=2e-4)
