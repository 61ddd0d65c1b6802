"""learned_rope with steps for every frequency: every form and all gradients against float64, and where it begins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sympow_jax.config import layer_specs
from sympow_jax.layers.attention import Attention
from sympow_jax.layers.context import Context
from sympow_jax.models.model import Model, resolve_implementation
from tests.models.small import VOCAB, moved, tiny_config

T, H, K, D, F = 13, 4, 2, 16, 8
IDS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0]], np.int32)
ROWS = ("conformal_vector_sympow", "selective_rope")


def layer_of(variant: str, *flags: str) -> Attention:
    config = tiny_config(variant, f"model.num_heads={H}", f"model.num_kv_heads={K}", "attention.chunk_size=5", *flags)
    return Attention(layer_specs(config)[0], config.model, rngs=nnx.Rngs(0))


def context_of(offset: int = 0, segment_ids=None) -> Context:
    return Context(jnp.int32(offset), None, None if segment_ids is None else jnp.asarray(segment_ids), None, T)


def by_hand(params, x, seen):
    """Planes d and d + F turn by the sum of their own steps since the document began, and fade by their own gates."""
    steps = 1 + jnp.tanh(x @ params["beta_down"]["kernel"] @ params["beta_up"]["kernel"]).reshape(T, K, F)
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(F) / F), x.dtype)
    angles = jnp.einsum("ij,jkf->ikf", jnp.asarray(seen, x.dtype), steps) * frequencies[None, None]
    decay = jnp.ones((T, T, K, D), x.dtype)
    if "gate" in params:
        gates = jax.nn.log_sigmoid(x @ params["gate"]["kernel"] + params["gate"]["bias"][None]).reshape(T, K, F)
        total = jnp.cumsum(jnp.concatenate([gates, gates], -1), axis=0)
        decay = jnp.exp(jnp.where(seen[..., None, None], total[:, None] - total[None], 0.0))
    q, k, v = ((x @ params[name]["kernel"]).reshape(T, -1, D) for name in ("query", "key", "value"))
    q, k = (turned(y, jnp.repeat(angles, y.shape[1] // K, axis=1)) for y in (q, k))
    q = q.reshape(T, K, H // K, D)
    scores = jnp.einsum("ikgd,jkd,ijkd->kgij", q, k, decay) / 4
    weights = jnp.where(seen[None, None], scores**2 if "gate" in params else jnp.exp(scores), 0.0)
    total = jnp.where(seen.any(-1)[None, None], weights.sum(-1), 1.0)
    out = jnp.einsum("kgij,jkd,kgi->ikgd", weights, v, 1 / total)
    return out.reshape(T, H * D) @ params["out"]["kernel"]


def turned(x, angles):
    first, second = x[..., :F], x[..., F:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.cache
def case(variant: str):
    """Parameters away from their beginning, inputs, cotangents, and loss and gradients in float64."""
    rng = np.random.default_rng(0)
    params = moved(nnx.to_pure_dict(nnx.split(layer_of(variant))[1]), 0.3)
    x, cotangent = (rng.normal(size=(T, 32)).astype(np.float32) for _ in range(2))
    seen = np.tril(IDS[0][:, None] == IDS[0]) & (IDS[0] != 0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x, cotangent))
        loss = jax.jit(jax.value_and_grad(lambda p, x, c: jnp.sum(by_hand(p, x, seen) * c), argnums=(0, 1)))
        return params, x, cotangent, jax.tree.map(np.asarray, loss(*wide))


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("conformal_vector_sympow", "chunked"),
        ("selective_rope", "blockwise"),
        *(
            pytest.param(*names, marks=[pytest.mark.slow, pytest.mark.quick])
            for names in (
                ("conformal_vector_sympow", "reference"),
                ("conformal_vector_sympow", "blockwise"),
                ("conformal_vector_sympow", "recurrent"),
                ("selective_rope", "reference"),
            )
        ),
    ],
)
def test_every_form_is_the_formula(variant, form):
    """Values and all gradients over documents and padding, with two queries to a key."""
    params, x, cotangent, want = case(variant)
    graph, state = nnx.split(layer_of(variant, f"attention.implementation={form}"))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, x):
        nnx.replace_by_pure_dict(state, params)
        return jnp.sum(nnx.merge(graph, state)(x[None], context_of(segment_ids=IDS))[0][0] * cotangent)

    found = loss(params, jnp.asarray(x))
    assert {"beta_down", "beta_up"} < found[1][0].keys()
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max() + 1e-6, err_msg=str(path))


@pytest.mark.parametrize("variant", ROWS)
def test_a_stream_goes_on_where_every_frequency_stood(variant):
    """Chunks and single tokens are the whole sequence."""
    params, x, _, _ = case(variant)
    graph, state = nnx.split(layer_of(variant))
    nnx.replace_by_pure_dict(state, params)

    @jax.jit
    def both(x):
        layer = nnx.merge(graph, state)
        whole, stream, parts = layer(x, context_of())[0], layer.initial_state(1, T), []
        for start, stop in ((0, 7), (7, 8), (8, T)):
            part, stream = layer(x[:, start:stop], context_of(start), stream)
            parts.append(part)
        return whole, jnp.concatenate(parts, axis=1), stream["phase"].integer

    whole, parts, integer = both(jnp.asarray(x)[None])
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * float(jnp.abs(whole).max()))
    assert integer.shape == (1, K, F) and len({*np.asarray(integer).ravel().tolist()}) > 4


def test_equal_steps_of_all_frequencies_are_one_step_a_head():
    one, each = (layer_of("conformal_vector_sympow", f"position.rotation={name}") for name in ("scalar", "frequency"))
    params = moved(nnx.to_pure_dict(nnx.split(one)[1]), 0.3)
    down = np.pad(params["beta"]["kernel"], [(0, 0), (0, 16 - K)])
    up = np.kron(np.eye(16, K), np.ones((1, F))).astype(np.float32)
    equal = {name: array for name, array in params.items() if name != "beta"}
    equal |= {"beta_down": {"kernel": down}, "beta_up": {"kernel": up}}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, T, 32)), jnp.float32)
    outs = []
    for layer, values in ((one, params), (each, equal)):
        graph, state = nnx.split(layer)
        nnx.replace_by_pure_dict(state, values)
        outs.append(jax.jit(lambda x, g=graph, s=state: nnx.merge(g, s)(x, context_of(segment_ids=IDS))[0])(x))
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-5, atol=1e-6)
    assert np.abs(outs[0]).max() > 0.1


def test_steps_vary_at_first_as_one_step_a_head_does():
    wide = ("model.embed_dim=512", "model.num_heads=8", "model.num_kv_heads=8")
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 64, 512)), jnp.float32)
    one, each = (
        Attention(layer_specs(config)[0], config.model, rngs=nnx.Rngs(0)).steps(x)
        for config in (tiny_config("conformal_vector_sympow", *wide, f"position.rotation={name}")
                       for name in ("scalar", "frequency"))
    )  # fmt: skip
    assert one.shape == (2, 64, 8) and each.shape == (2, 64, 8, 8)
    assert np.std(np.arctanh(each - 1)) / np.std(np.arctanh(one - 1)) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_65536_tokens_stream_in_constant_state_and_in_pieces_of_any_length():
    """The phases are the same to the bit whatever the pieces, and the last logits are the same."""
    model = Model(resolve_implementation(tiny_config("conformal_vector_sympow", "model.num_layers=1")), VOCAB)
    params = jax.device_put(moved(model.init(jax.random.key(1)), 0.1))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 65_536)).astype(np.int32)
    step, ends = jax.jit(model.logits), []
    for size in (4_096, 16_384):
        state = model.initial_state(1, 1)
        shapes = jax.tree.map(jnp.shape, state)
        for start in range(0, tokens.shape[1], size):
            logits, state = step(params, tokens[:, start : start + size], state=state)
        assert jax.tree.map(jnp.shape, state) == shapes
        ends.append((logits[:, -1], state["blocks_0"][0]["phase"]))
    jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-4)
    assert 1_000 < ends[0][1].integer.min() < ends[0][1].integer.max() < 2 * 65_536
