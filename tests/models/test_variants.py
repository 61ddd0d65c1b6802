"""Every variant: causal, streamable, the same in every form, trainable, and of the size that its formulas say."""

import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import linear_specs, override
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state, from_tree, to_tree
from sympow_jax.variants import VARIANTS
from tests.evals.toy import make_store
from tests.models.small import MECHANISMS, VOCAB, moved, tiny_config

T = 24
ALL = (*VARIANTS, "hybrid")
pytestmark = [pytest.mark.slow, pytest.mark.quick]


@functools.cache
def model_and_params(variant: str, *flags: str):
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    return model, jax.device_put(moved(model.init(jax.random.key(1)), 0.1))  # every parameter must matter


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (2, T)).astype(np.int32)


@pytest.mark.parametrize("variant", ALL)
def test_causal_by_gradient(variant):
    """The loss of target t has exactly zero gradient in the embeddings of later inputs."""
    model, params = model_and_params(variant, "model.tied_embeddings=false")  # the table enters through inputs only
    inputs = jnp.arange(T, dtype=jnp.int32)[None, :]  # every position has its own row of the table
    cut = 11

    @jax.jit
    @jax.grad
    def early_loss(table):
        nll, _ = model.nll(params | {"embedding": {"embedding": table}}, inputs, inputs)
        return nll[:, : cut + 1].sum()

    grads = early_loss(params["embedding"]["embedding"])
    assert np.all(np.asarray(grads)[cut + 1 : T] == 0)
    assert np.all(np.abs(np.asarray(grads)[: cut + 1]).max(axis=1) > 0)


@pytest.mark.parametrize("variant", MECHANISMS)
def test_streaming_equals_the_whole_sequence(variant):
    """Chunks of any length, single tokens included, through the state give the logits of one pass."""
    model, params = model_and_params(variant)
    run = jax.jit(model.logits)
    whole, none = run(params, tokens())
    assert none is None
    state = model.initial_state(2, T)
    shapes = jax.tree.map(jnp.shape, state)
    parts = []
    for start, stop in ((0, 10), (10, 11), (11, 12), (12, 22), (22, 23), (23, 24)):
        part, state = run(params, tokens()[:, start:stop], state=state)
        parts.append(part)
        assert jax.tree.map(jnp.shape, state) == shapes
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", ALL)
def test_forms_agree_with_the_reference(variant):
    """Loss and the gradients of all parameters, the fast form against the dense one."""
    model, params = model_and_params(variant)
    forms = ("chunked", "blockwise") if linear_specs(model.config) else ("blockwise",)

    def loss_and_grads(form):
        other = Model(override(model.config, {"attention.implementation": form, "attention.chunk_size": 10}), VOCAB)
        return jax.jit(jax.value_and_grad(lambda p: other.nll(p, tokens(), tokens())[0].mean()))(params)

    want_loss, want = loss_and_grads("reference")
    for form in forms:
        loss, grads = loss_and_grads(form)
        assert abs(float(loss - want_loss)) < 1e-5
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
            scale = max(float(jnp.linalg.norm(b.ravel())), 1e-3)
            error = float(jnp.linalg.norm((a - b).ravel())) / scale
            assert error < 2e-3, f"{form} {jax.tree_util.keystr(path)}: {error}"


def corpus_batch() -> dict[str, np.ndarray]:
    """The start of two modules of the quickstart's corpus, after BOS."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = [list((folder / name).read_bytes()[:T]) for name in ("argparse.py", "heapq.py")]
    targets = np.array(text, np.int32)
    return {"inputs": np.concatenate([np.full((2, 1), 256, np.int32), targets[:, :-1]], 1), "targets": targets}


@pytest.mark.parametrize("variant", MECHANISMS)
def test_one_step_lowers_the_loss_and_a_resumed_run_goes_on_alike(variant, tmp_path):
    """The loss falls at once and every parameter moves; saved and restored, the next step is the same to the bit."""
    model = Model(resolve_implementation(tiny_config(variant, "optimizer.warmup_steps=0")), 257)
    state = create_train_state(model, seed=0)
    first = jax.tree.map(np.asarray, state.params)
    step = make_train_step(model)
    losses = []
    with jax.numpy_dtype_promotion("standard"), Checkpointer(tmp_path) as checkpointer:  # optax mixes dtypes
        for number in range(1, 5):
            if number == 4:
                checkpointer.save(3, to_tree(state), metadata={}, metrics={}, force=True)
                restored = checkpointer.restore("latest", like=jax.eval_shape(to_tree, state))
                resumed = from_tree(jax.tree.map(jnp.asarray, restored.tree), state)
            state, metrics = step(state, corpus_batch())
            losses.append(float(metrics["loss"]))
        resumed, metrics = step(resumed, corpus_batch())
    assert losses[1] < losses[0]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(first), strict=True):
        assert np.any(np.asarray(a) != b), f"{jax.tree_util.keystr(path)} did not move"
    assert float(metrics["loss"]) == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, to_tree(resumed), to_tree(state))


@pytest.mark.parametrize("variant", MECHANISMS)
def test_evaluates_at_eight_times_its_length(variant):
    """By the evaluation itself, and its last prefix is the mean loss of one whole pass."""
    model, params = model_and_params(variant, f"evaluation.lengths={T},{8 * T}")
    store = make_store(num_documents=2, length=8 * T, vocab=VOCAB - 1)
    options = {"train_length": T, "num_documents": 2, "batch_size": 2, "chunk_size": 2 * T}
    result, _ = length_generalisation(model, params, store, lengths=[T, 8 * T], **options)
    targets = store.read(slice(0, 2), slice(0, 8 * T)).astype(np.int32)
    inputs = np.concatenate([np.full((2, 1), store.bos_id, np.int32), targets[:, :-1]], 1)
    whole, _ = jax.jit(model.nll)(params, inputs, targets)
    np.testing.assert_allclose(result["lengths"][1]["nll"], np.asarray(whole).mean(), rtol=1e-4)
