"""Options that keep the temperature of softmax, and the norm of each head's output, against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sympow_jax.config import ConfigError, layer_specs
from sympow_jax.layers.attention import Attention
from sympow_jax.layers.context import Context
from sympow_jax.layers.projections import initial_log_scale
from tests.models.small import tiny_config

T, H, D = 13, 2, 16
IDS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0]], np.int32)


def layer_of(pattern: str, *flags: str) -> Attention:
    config = tiny_config("softmax_nope", f"attention.layer_pattern={pattern}", "attention.window=5", *flags)
    return Attention(layer_specs(config)[0], config.model, rngs=nnx.Rngs(0))


def context_of(segment_ids=None) -> Context:
    return Context(jnp.int32(0), None, None if segment_ids is None else jnp.asarray(segment_ids), None, T)


def by_hand(params, x, seen, norm: bool):
    """Scores times s log n for the n keys that a row sees, a sink, each head's output over its root mean square."""
    factor = params["log_length_scale"][:, None] * np.log(np.maximum(seen.sum(-1), 1))[None]
    q, k, v = ((x @ params[name]["kernel"]).reshape(-1, H, D) for name in ("query", "key", "value"))
    logits = jnp.einsum("ihd,jhd->hij", q, k) / 4 * factor[..., None]
    weights = jnp.where(seen[None], jnp.exp(logits), 0.0)
    total = weights.sum(-1) + jnp.exp(params["sinks"][:, None])
    out = jnp.einsum("hij,jhd->ihd", weights, v) / total.T[..., None]
    if norm:
        out = (
            out / jnp.sqrt(jnp.mean(out**2, axis=-1, keepdims=True) + 1e-5) * params["output_norm"]["scale"][None, None]
        )
    return out.reshape(-1, H * D) @ params["out"]["kernel"]


@pytest.mark.parametrize(
    ("pattern", "segment_ids", "form", "norm"),
    [("attention", IDS, "blockwise", True), ("window", None, "reference", False)],
)
def test_scores_are_times_s_log_n_and_heads_are_normed(pattern, segment_ids, form, norm, rng):
    """Values and all gradients; n counts what window and document let a row see."""
    flags = ("attention.log_length_scale=true", "attention.sinks=true", f"attention.output_norm={norm}".lower())
    layer = layer_of(pattern, *flags, f"attention.implementation={form}")
    graph, state = nnx.split(layer)
    params = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), nnx.to_pure_dict(state))
    x, cotangent = rng.normal(size=(1, T, 32)).astype(np.float32), rng.normal(size=(T, 32)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        nnx.replace_by_pure_dict(state, params)
        return jnp.sum(nnx.merge(graph, state)(jnp.asarray(x), context_of(segment_ids))[0][0] * cotangent)

    found = loss(params)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (5 if pattern == "window" else T))
    if segment_ids is not None:
        seen &= (segment_ids[0][:, None] == segment_ids[0]) & (segment_ids[0] != 0)
    with jax.enable_x64(True):
        wide, x, cotangent = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x[0], cotangent))
        exact = jax.jit(jax.value_and_grad(lambda p: jnp.sum(by_hand(p, x, seen, norm) * cotangent)))
        want = jax.tree.map(np.asarray, exact(wide))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max() + 1e-6, err_msg=str(path))


@pytest.mark.parametrize("pattern", ["attention", "window"])
def test_a_stream_counts_the_keys_of_earlier_calls(pattern, rng):
    layer = layer_of(pattern, "attention.log_length_scale=true", "attention.sinks=true")
    x = jnp.asarray(rng.normal(size=(1, T, 32)), jnp.float32)

    @jax.jit
    def both(x):
        whole, state, parts = layer(x, context_of())[0], layer.initial_state(1, T), []
        for start, stop in ((0, 7), (7, 8), (8, T)):
            context = Context(jnp.int32(start), None, None, None, T)
            part, state = layer(x[:, start:stop], context, state)
            parts.append(part)
        return whole, jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(*both(x), rtol=1e-5, atol=1e-6)


def test_the_scale_starts_where_trained_lengths_have_the_usual_temperature():
    """The mean of s log n is 1 over the keys that rows of the trained length see."""
    for trained, window in ((24, None), (24, 5), (3, 5)):
        n = np.arange(1, min(trained, window or trained) + 1)
        assert initial_log_scale(trained, window) * np.mean(np.log(n)) == pytest.approx(1)
    assert initial_log_scale(1, None) == pytest.approx(2 / math.log(2))
    start = layer_of("attention", "attention.log_length_scale=true", "data.seq_len=20").log_length_scale[...]
    np.testing.assert_allclose(start, initial_log_scale(20, None), rtol=1e-6)


def test_linear_layers_have_a_norm_and_no_temperature():
    """A factor of all scores of a row is no temperature where the weight is a power of them."""
    flags = ("attention.log_length_scale=true", "attention.sinks=true", "attention.output_norm=true")
    layer = layer_of("sympow,fox", *flags)
    assert (
        not hasattr(layer, "log_length_scale")
        and not hasattr(layer, "sinks")
        and layer.output_norm.scale[...].shape == (D,)
    )
    with pytest.raises(ConfigError, match=r"log_length_scale = True: is of softmax layers, and all .* power or taylor"):
        layer_of("sympow,based", "attention.log_length_scale=true")
    with pytest.raises(ConfigError, match=r"attention.sinks = True: is of softmax layers"):
        layer_of("sympow", "attention.sinks=true")
