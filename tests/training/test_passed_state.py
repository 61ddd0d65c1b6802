"""What a batch begins with: the state of the batch before, noise of its size, or the state of another row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.input_pipeline import sampler
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.passed_state import empty_stream, state_before
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state, from_tree, to_tree
from tests.models.small import VOCAB, moved, tiny_config

T, B = 12, 2


def make_model(variant: str, how: str, *flags: str) -> Model:
    flags = (f"data.seq_len={T}", f"data.batch_size={B}", "data.order=stream", "model.num_layers=1", *flags)
    return Model(resolve_implementation(tiny_config(variant, f"training.initial_state={how}", *flags)), VOCAB)


def test_rows_go_on_until_their_documents_end():
    """5 documents of 3 windows, 2 rows: documents 0 and 1, then 2 and 3, then 4 and 0 again."""
    grid = sampler.Grid(num_rows=5, num_blocks=3, seq_len=4, chunks=(2, 4))
    found = []
    for step in range(9):
        for run in sampler.runs(grid, 2 * step, 2 * step + 2, order="stream", seed=0, batch_size=2):
            found += [(row, run.block) for row in range(run.start, run.stop)]
    documents = [(0, 1), (2, 3), (4, 0)]
    assert found == [(row, block) for pair in documents for block in range(3) for row in pair]


@pytest.mark.parametrize(
    "variant",
    [
        "conformal_sympow",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sympow_gated", "based", "conformal_vector_sympow")),
    ],
)
def test_two_chunks_with_a_carried_state_are_the_whole_sequence(variant):
    """Losses and gradients, where the state keeps its own."""
    model = make_model(variant, "carried")
    params = moved(model.init(jax.random.key(0)), 0.05)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (B, 2 * T + 1)).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, pieces):
        state, found = model.initial_state(B, T, differentiable=True), []
        for piece in np.split(np.arange(2 * T), pieces):
            features = model.features(params, tokens[:, piece], state=state)
            state = features.state
            found.append(model.token_losses(features, tokens[:, piece + 1])[0])
        nll = jnp.concatenate(found, axis=1)
        return jnp.sum(nll), nll

    for a, b in zip(jax.tree.leaves(loss(params, 1)), jax.tree.leaves(loss(params, 2)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4, rtol=3e-4)


def batch_of(tokens_before: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(tokens_before).integers(0, VOCAB, (B, T + 1)).astype(np.int32)
    start = np.full((B, T), tokens_before, np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "tokens_before": start}


def test_a_step_leaves_the_state_that_the_next_one_begins_with():
    """Carried until a document begins, in the checkpoint's names and back, and unlike a step from nothing."""
    model = make_model("sympow_gated", "carried")
    step = make_train_step(model)
    states, losses = [create_train_state(model, 0)], []
    for number in (0, 1):
        copy = jax.tree.map(jnp.copy, states[-1])
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            state, metrics = step(copy, batch_of(number * T))
        states.append(from_tree(to_tree(state), state))
        losses.append(float(metrics["loss"]))
    nll_of = jax.jit(model.nll)
    nll, after = nll_of(states[0].params, **{k: batch_of(0)[k] for k in ("inputs", "targets")}, state=states[0].stream)
    assert np.isclose(losses[0], float(jnp.mean(nll)), rtol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), states[1].stream, after))
    tokens = {k: batch_of(T)[k] for k in ("inputs", "targets")}
    on, anew = (float(jnp.mean(nll_of(states[1].params, **tokens, state=s.stream)[0])) for s in (states[1], states[0]))
    assert np.isclose(losses[1], on, rtol=1e-6) and abs(on - anew) > 2e-5
    begun = state_before(model, states[2].stream, batch_of(0), jnp.int32(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, begun, states[0].stream))


def test_documents_that_begin_in_a_step_that_is_skipped_do_not_go_on_from_those_before():
    model = make_model("sympow_gated", "carried")
    step, bad = make_train_step(model), {"loss_mask": np.full((B, T), np.nan, np.float32)}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state, _ = step(create_train_state(model, 0), batch_of(0) | {"loss_mask": np.ones((B, T), np.float32)})
        left = jax.tree.map(np.array, state.stream)
        state, within = step(state, batch_of(T) | bad)
        jax.tree.map(np.testing.assert_array_equal, state.stream, left)
        state, first = step(state, batch_of(0) | bad)
    assert (within["skipped"], first["skipped"]) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, state.stream, empty_stream(model))


def test_noise_has_the_size_of_states_and_other_documents_are_those_of_other_rows():
    left = first_kernel(empty_stream(make_model("sympow", "noise")))
    draw = np.random.default_rng(0)
    left = dataclasses.replace(
        left,
        state=draw.normal(size=left.state.shape).astype(np.float32) * 3,
        normalizer=np.ones(left.normalizer.shape, np.float32),
    )
    for how in ("noise", "other_document"):
        model = make_model("sympow", how)
        stream = empty_stream(model)
        stream = jax.tree.map(lambda x: left if is_kernel(x) else x + 5 * T, stream, is_leaf=is_kernel)
        before = [state_before(model, stream, {}, jnp.int32(n)) for n in (1, 1, 3, 2)]
        kernel = first_kernel(before[0])
        assert jax.tree.all(jax.tree.map(np.array_equal, before[0], before[1]))
        assert jax.tree.all(jax.tree.map(np.array_equal, before[3], empty_stream(model)))
        if how == "noise":
            assert 2.7 < float(jnp.std(kernel.state)) < 3.3 and not np.allclose(kernel.state, left.state)
            assert not np.allclose(kernel.state, first_kernel(before[2]).state)
            np.testing.assert_array_equal(kernel.normalizer, left.normalizer)
            assert int(before[0]["offset"]) == 0
        else:
            np.testing.assert_array_equal(kernel.state, left.state[::-1])
            assert int(before[0]["offset"]) == T


@pytest.mark.parametrize("how", ["noise", "other_document"])
def test_what_a_batch_begins_with_does_not_grow_from_step_to_step(how):
    """Where nothing decays: every normaliser is that of one batch, at step 7 as at step 1."""
    model = make_model("sympow", how)
    params, stream, found = model.init(jax.random.key(0)), empty_stream(model), []
    follow = jax.jit(lambda params, inputs, state: model.features(params, inputs, state=state).state)
    for number in range(8):
        before = state_before(model, stream, {}, jnp.int32(number))
        stream = follow(params, batch_of(number)["inputs"], before)
        found.append(float(jnp.mean(first_kernel(before).normalizer)))
    assert found[::2] == [0, 0, 0, 0]
    assert found[1] > 0 and 0.5 < found[7] / found[1] < 2


def is_kernel(node):
    return hasattr(node, "normalizer")


def first_kernel(state):
    return next(node for node in jax.tree.leaves(state, is_leaf=is_kernel) if is_kernel(node))


@pytest.mark.parametrize(
    ("variant", "flags", "message"),
    [
        ("softmax_rope", (), "a layer of softmax attention keeps a cache"),
        ("sympow", ("data.order=rectangle",), "data.order = 'rectangle' does not"),
        ("sympow", ("optimizer.accumulation_steps=2",), "does not go together with optimizer.accumulation_steps"),
    ],
)
def test_what_cannot_be_carried_is_refused(variant, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_model(variant, "carried", *flags)
