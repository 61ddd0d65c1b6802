"""Every variant: causal, streamable, the same in every form, trainable, and of the size that its formulas say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import override
from sympow_jax.models.registry import Model, resolve_implementation
from sympow_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from sympow_jax.variants import LINEAR_KERNELS, VARIANTS
from tests.models.small import VOCAB, tiny_config

T = 24


def variants(*quick: str):
    """All variants; only `quick` ones run in `make test`, the others in `make test-all`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in VARIANTS]


@functools.cache
def model_and_params(variant: str, *flags: str):
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    params = model.init(jax.random.key(1))
    noise = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    leaves, tree = jax.tree.flatten(params)  # leave the symmetric initial point: every parameter must matter
    return model, jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, noise, strict=True)]
    )


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (2, T)).astype(np.int32)


@pytest.mark.parametrize("variant", variants("conformal_sympow", "fox"))
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


@pytest.mark.parametrize("variant", variants("conformal_sympow"))
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


@pytest.mark.parametrize("variant", variants("conformal_sympow"))
def test_forms_agree_with_the_reference(variant):
    """Loss and the gradients of all parameters, the fast form against the dense one."""
    model, params = model_and_params(variant)
    forms = ("chunked", "blockwise") if model.config.attention.kernel in LINEAR_KERNELS else ("blockwise",)

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


@pytest.mark.parametrize("variant", variants("conformal_sympow", "rebased"))
def test_training_lowers_the_loss(variant):
    """Ten steps on one batch: the loss falls and every parameter moves."""
    model = Model(resolve_implementation(tiny_config(variant, "optimizer.warmup_steps=0")), VOCAB)
    optimizer = make_optimizer(model.config.optimizer, 100)
    state = create_train_state(model, optimizer, seed=0)
    first = jax.tree.map(np.asarray, state.params)
    step = make_train_step(model, optimizer, learning_rate_schedule(model.config.optimizer, 100))
    batch = {"inputs": tokens(), "targets": tokens() * 7 % VOCAB}
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(10):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(first), strict=True):
        assert np.any(np.asarray(a) != b), f"{jax.tree_util.keystr(path)} did not move"
