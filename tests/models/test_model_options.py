"""Options that the families of published models differ by, against a decoder written by hand in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sympow_jax.config import ConfigError
from sympow_jax.layers.linear import make_linear
from sympow_jax.layers.norm import make_norm
from sympow_jax.models.loss import token_nll
from sympow_jax.models.model import Model
from sympow_jax.training.data import vocabulary
from tests.models import decoder_by_hand
from tests.models.small import VOCAB, moved, tiny_config

T = 20
GROUPED = ("model.num_heads=4", "model.head_dim=8", "model.num_kv_heads=2")
RMS = ("model.norm=rmsnorm", "model.norm_eps=1e-3", "model.embedding_norm=false")
# a parallel pass is compared with the decoder by hand, and a stream with the pass
FAMILIES = {
    "everything-sandwiched": (
        "softmax_rope", *GROUPED, *RMS, "model.norm_placement=sandwich", "model.mlp=geglu", "model.mlp_bias=all",
        "attention.bias=all", "attention.qk_norm=true", "attention.scale=0.7", "model.logit_softcap=2.0",
        "model.embedding_scale=3.0", "model.residual_scale=0.3", "model.logit_scale=0.5", "model.vocab_size=64",
        "attention.layer_pattern=window,attention", "position.rotary_fraction=0.5",
        "position.window_base=100", "position.scaling=linear", "position.factor=4",
    ),
    "gpt-neox": (
        "softmax_rope", "position.rotary_fraction=0.25", "model.parallel_residual=true", "attention.bias=all",
        "model.mlp=gelu_exact", "model.embedding_norm=false", "model.tied_embeddings=false",
    ),
    "gpt-2": ("softmax_absolute", "attention.bias=all", "model.embedding_norm=false"),
    "granite": (
        "softmax_rope", *GROUPED, *RMS, "model.mlp=swiglu", "attention.scale=0.1", "model.embedding_scale=12.0",
        "model.residual_scale=0.22", "model.logit_scale=0.125",
    ),
    "bloom": ("softmax_alibi", "attention.bias=all"),
    "qwen2": ("softmax_rope", *GROUPED, *RMS, "model.mlp=swiglu", "attention.bias=qkv", "model.tied_embeddings=false"),
    "olmo2": (
        "softmax_rope", *GROUPED, *RMS, "model.mlp=swiglu", "model.norm_placement=post", "attention.qk_norm=true",
        "attention.qk_norm_span=concatenated", "attention.qk_norm_eps=1e-3",
    ),
}  # fmt: skip
SOON = ("everything-sandwiched",)


@pytest.mark.parametrize(
    "family", [f if f in SOON else pytest.param(f, marks=[pytest.mark.slow, pytest.mark.quick]) for f in FAMILIES]
)
def test_a_family_is_its_decoder_by_hand_and_streams(family):
    config = tiny_config(*FAMILIES[family])
    model = Model(config, VOCAB)
    params = moved(jax.jit(model.init)(jax.random.key(0)), 0.2)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, T)).astype(np.int32)
    want = decoder_by_hand.logits(config, jax.tree.map(np.float64, params), tokens[0])
    run = jax.jit(model.logits)
    found, _ = run(params, tokens)
    spread = want.std()
    np.testing.assert_allclose(found[0], want, rtol=0, atol=3e-5 * spread)
    assert found.shape[-1] == (config.model.vocab_size or VOCAB)
    first, state = run(params, tokens[:, :18], state=model.initial_state(1, T))
    np.testing.assert_allclose(first, found[:, :18], rtol=0, atol=1e-4 * spread)
    step = jax.jit(model.next_logits)
    for t in (18, 19):
        last, state = step(params, tokens[:, t : t + 1], state)
        np.testing.assert_allclose(last, found[:, t, :VOCAB], rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_is_exact_where_the_mean_is_large(norm, rng):
    """A mean of 300 standard deviations, which cancels in mean(x^2) - mean^2."""
    config = tiny_config("softmax_rope", f"model.norm={norm}")
    x = (300 + rng.normal(size=(2, 5, 32))).astype(np.float32)
    params = {"scale": np.ones(32), "bias": np.zeros(32)}
    want = decoder_by_hand.normed(params, x.astype(np.float64), 1e-5, centred=norm == "layernorm")
    found = make_norm(config.model, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_a_capped_loss_in_blocks_is_the_dense_one_with_its_gradients(rng):
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 9, 5), (5, 7)))
    targets = rng.integers(0, 7, (2, 9)).astype(np.int32)

    def dense(hidden, kernel):
        logits = 3.0 * jnp.tanh(0.5 * (hidden @ kernel) / 3.0)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).sum()

    def blocked(hidden, kernel):
        return token_nll(hidden, kernel, targets, block=4, scale=0.5, softcap=3.0)[0].sum()

    (want, wanted), (found, gradients) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel) for f in (dense, blocked)
    )
    np.testing.assert_allclose(found, want, rtol=1e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ConfigError, match=r"model.vocab_size = 60: the tokenizer has 61 ids; use 0, or at least that"):
        Model(tiny_config("softmax_rope", "model.vocab_size=60"), VOCAB)
    unseen = tiny_config("softmax_rope", "model.vocab_size=60", "data.train=a/store", "data.heldout=a/store")
    assert vocabulary(unseen) == 60


def test_yarns_factor_multiplies_the_rotated_dims_only():
    """Scores are factor^2 (rotated part) + the rest."""
    flags = (
        "position.rotary_fraction=0.5",
        "position.scaling=yarn",
        "position.factor=4",
        "position.attention_factor=2",
    )
    model = Model(tiny_config("softmax_rope", *flags), VOCAB)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = moved(jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes), 0.2)
    bound = model.bind(jax.device_put(params))
    mixer, context = next(bound.layers()).mixer, bound.begin(jnp.zeros((1, 3), jnp.int32))[1]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 32)), jnp.float32)
    tokens = mixer.tokens(x, context)
    q, k, _, scale = mixer.kernel_inputs(x, context)
    found = scale * jnp.sum(q[:, 0] * k[:, 0], -1)  # of the first token, where the angle is 0
    products = tokens.q[:, 0] * tokens.k[:, 0] / 4
    want = 4 * jnp.sum(products[..., :8], -1) + jnp.sum(products[..., 8:], -1)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_bias_is_added_to_sums_before_they_are_rounded(rng):
    x, kernel, bias, grad = (rng.standard_normal(shape) for shape in ((2, 3, 8), (8, 5), (5,), (2, 3, 5)))
    x, kernel, grad = (jnp.asarray(value, jnp.bfloat16) for value in (x, kernel, grad))
    layer = make_linear(tiny_config("sympow", "model.dtype=bfloat16").model, 8, 5, bias=True, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = kernel.astype(jnp.float32), jnp.asarray(bias, jnp.float32)
    graph, state = nnx.split(layer)
    out, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
    wide = [np.asarray(value, np.float64) for value in (x, kernel, grad)]
    sums = jnp.asarray(wide[0] @ wide[1] + np.float32(bias), jnp.float32)
    assert out.dtype == jnp.bfloat16 and np.array_equal(out, sums.astype(jnp.bfloat16))
    d_layer, d_x = pull(grad)
    close = functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.02)
    close(np.asarray(d_x, np.float64), wide[2] @ wide[1].T)
    close(np.asarray(d_layer["kernel"][...], np.float64), np.einsum("bti,bto->io", wide[0], wide[2]))
    close(np.asarray(d_layer["bias"][...], np.float64), wide[2].sum((0, 1)))
