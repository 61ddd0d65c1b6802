"""Sizes by hand, every config at full size, and the switches that must not change a result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import override, parse_flags
from sympow_jax.models import flops
from sympow_jax.models.loss import token_logits, token_nll
from sympow_jax.models.model import Model, resolve_implementation
from tests.models.small import ROOT, VOCAB, tiny_config

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's norms mix float32 statistics with a bfloat16 compute dtype and cast the result."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def count(config, vocab_size: int = VOCAB) -> int:
    params = jax.eval_shape(Model(config, vocab_size).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_parameter_counts_by_hand():
    """E = 32, H = K = 2, D = 16, F = 48, V = 61, two layers; LayerNorms with bias, MLP with biases."""
    layer = 4 * 32 * 32 + 2 * 2 * 32 + (32 * 48 + 48 + 48 * 32 + 32)
    base = 61 * 32 + 2 * 64 + 2 * layer
    gate, beta = 2 * (32 * 2 + 2), 2 * 32 * 2
    gates, betas = 2 * (32 * 2 * 8 + 2 * 8), 2 * (32 * 16 + 16 * 2 * 8)  # of 8 planes a head; betas of rank 16
    extra = {
        "softmax_nope": 0, "softmax_rope": 0, "softmax_alibi": 0, "softmax_sandwich": 0, "sympow": 0,
        "fox": gate, "sympow_gated": gate, "conformal_sympow": gate + beta, "conformal_softmax": gate + beta,
        "conformal_vector_sympow": gates + betas, "selective_rope": betas,
        "softmax_kerple_log": 2 * 2 * 2, "softmax_kerple_power": 2 * 2 * 2, "softmax_t5": 2 * 32 * 2,
        "softmax_fire": 2 * (2 + 2 * 32 + 32 * 2 + 2), "softmax_fire_shared": 2 + 2 * 32 + 32 * 2 + 2,
        "softmax_absolute": 48 * 32,
    }  # fmt: skip
    assert {name: count(tiny_config(name)) for name in extra} == {name: base + n for name, n in extra.items()}


def test_parameter_counts_of_the_hybrids():
    """Taylor and ReBased layers have q and k of 4 a head; a gated convolution E -> 2E, 3 taps of E, E -> E."""
    mlp, norms, embedding = 32 * 48 + 48 + 48 * 32 + 32, 128, 61 * 32 + 2 * 64
    gated = (32 * 64 + 64) + 3 * 32 + (32 * 32 + 32)
    linear, window = 2 * 32 * 8 + 2 * 32 * 32, 4 * 32 * 32
    assert count(tiny_config("based")) == embedding + 3 * (mlp + norms) + gated + linear + window
    short, norm = 32 * 32 + 3 * 32, 2 * 2 * 4
    assert count(tiny_config("rebased")) == embedding + 2 * (mlp + norms) + short + linear + norm


def test_gpt2_small_with_conformal_sympow_has_124m_parameters():
    config = parse_flags([f"--config={ROOT}/configs/lc64_124m.py:conformal_sympow,4096"])
    gpt2 = 50_257 * 768 + 2 * 2 * 768 + 12 * (4 * 768**2 + 2 * 2 * 768 + 8 * 768**2 + 5 * 768)
    assert count(config, 50_257) == gpt2 + 12 * (2 * 768 * 12 + 12)


def test_based_360m_has_the_size_of_its_name():
    config = parse_flags([f"--config={ROOT}/configs/based_360m.py"])
    assert 355e6 < count(config, 50_257) < 370e6


CONFIGS = sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.py") if p.stem[0] != "_")


@pytest.mark.slow
@pytest.mark.parametrize("argument", [*CONFIGS, "lc64_124m.py:sympow,65536", "small.py:30m,fox"])
def test_every_config_builds_at_full_size(argument):
    """Shapes of the loss and its gradient, without memory for either."""
    config = resolve_implementation(parse_flags([f"--config={ROOT}/configs/{argument}"]))
    model = Model(config, 50_257)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
    grads = jax.eval_shape(jax.grad(lambda p, x: model.nll(p, x, x)[0].mean()), params, tokens)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def batch() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).integers(0, VOCAB, (4, 24)).astype(np.int32)
    return {"inputs": x, "targets": np.roll(x, -1, 1)}


@functools.cache
def loss_and_grads(config):
    model = Model(config, VOCAB)
    params = model.init(jax.random.key(0))
    b = batch()
    return jax.jit(jax.value_and_grad(lambda p: model.nll(p, b["inputs"], b["targets"])[0].mean()))(params)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["model.scan_layers=false", "model.remat=block", "model.loss_block=17"])
def test_switches_that_change_memory_do_not_change_results(switch):
    plain = tiny_config("conformal_sympow")
    key, value = switch.split("=")
    changed = override(plain, {key: value})
    assert changed != plain
    (loss, grads), (other_loss, other_grads) = loss_and_grads(plain), loss_and_grads(changed)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, other_grads)


@pytest.mark.slow
def test_bfloat16_stays_near_float32_and_keeps_float32_parameters_and_loss():
    plain = tiny_config("conformal_sympow")
    half = override(plain, {"model.dtype": "bfloat16"})
    (loss, grads), (half_loss, half_grads) = loss_and_grads(plain), loss_and_grads(half)
    assert half_loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_grads))
    assert 0 < abs(float(loss - half_loss)) < 0.02
    flat, half_flat = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, half_grads))
    assert float(jnp.linalg.norm(flat - half_flat) / jnp.linalg.norm(flat)) < 0.05


def test_blocked_loss_equals_log_softmax(rng):
    hidden, kernel = rng.normal(size=(2, 9, 5)).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (2, 9)).astype(np.int32)
    logp = jax.nn.log_softmax(hidden @ kernel)
    want = -np.take_along_axis(np.asarray(logp), targets[..., None], -1)[..., 0]
    for block in (4, 18, 100):
        nll, log_z = token_nll(jnp.asarray(hidden), jnp.asarray(kernel), targets, block=block)
        np.testing.assert_allclose(nll, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(log_z, np.log(np.exp(hidden @ kernel).sum(-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 3.0}])
def test_gradient_of_the_blocked_loss_is_that_of_log_softmax_and_sums_no_logits_again(rng, options):
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 9, 5), (5, 7)))
    targets, weights = rng.integers(0, 7, (2, 9)), jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)

    def blocked(hidden, kernel):
        nll, log_z = token_nll(hidden, kernel, targets, block=4, **options)
        return jnp.sum(weights * nll + 0.1 * log_z**2)

    def plain(hidden, kernel):
        logits = token_logits(hidden, kernel, **options)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (log_z - picked) + 0.1 * log_z**2)

    gradient = jax.grad(blocked, argnums=(0, 1))
    for got, want in zip(gradient(hidden, kernel), jax.grad(plain, argnums=(0, 1))(hidden, kernel), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    program = str(jax.make_jaxpr(gradient)(hidden, kernel))
    assert program.count("= reduce_max[") == 1
    assert program.count("= dot_general[") == 4  # logits twice, and one product for each gradient


def test_flops_by_hand():
    """GPT-2 shape, degree 2, head_dim 64: P = 2080, 4 P 65 a head and layer; softmax T (64 + 64)."""
    config = resolve_implementation(parse_flags([f"--config={ROOT}/configs/lc64_124m.py:sympow,65536"]))
    assert config.attention.implementation == "chunked"
    assert flops.attention_flops_per_token(config, 65_536) == 12 * 12 * 4 * 2_080 * 65
    softmax = parse_flags([f"--config={ROOT}/configs/lc64_124m.py:softmax_rope,65536"])
    assert flops.attention_flops_per_token(softmax, 65_536) == 12 * 12 * 65_536 * 128


def test_window_flops_by_hand():
    """2 heads, 24 tokens: attention 24 (4 + 16); a window of 8 tokens 2 x 8 (16 + 16), of 20 never more than 24."""
    for window, seen in ((8, 16), (20, 24)):
        config = tiny_config("based", f"attention.window={window}", "attention.implementation=blockwise")
        assert flops.attention_flops_per_token(config, 24) == 2 * 24 * (4 + 16) + 2 * seen * (16 + 16)


def test_training_flops_are_three_times_the_forward_ones_by_hand():
    """6 a parameter and token: 2 layers of 4 x 32 x 32 and 2 x 32 x 48, and the embedding once, as output."""
    config = tiny_config("softmax_rope", "attention.implementation=blockwise")
    params = jax.eval_shape(Model(config, VOCAB).init, jax.random.key(0))
    attention, rest = flops.train_flops_per_token(config, params, 24)
    assert attention == 3 * 2 * 2 * 24 * (16 + 16)
    assert rest == 6 * (2 * (4 * 32 * 32 + 2 * 32 * 48) + VOCAB * 32)


def test_training_flops_count_the_gate_of_an_mlp_and_surplus_rows_of_the_logits():
    """Biases, norms, caps and scales are no products."""
    options = ("model.mlp=geglu", "model.mlp_bias=all", "attention.bias=all", "model.norm_placement=sandwich")
    config = tiny_config("softmax_rope", *options, "model.vocab_size=64", "model.logit_softcap=30")
    params = jax.eval_shape(Model(config, VOCAB).init, jax.random.key(0))
    assert flops.matrix_parameters(config, params) == 2 * (4 * 32 * 32 + 3 * 32 * 48) + 64 * 32


def test_yarns_factor_multiplies_queries_and_keys():
    """So the scale of the logits has it squared: (0.1 ln 4 + 1)^2 / sqrt(16)."""
    changes = {"position.scaling": "yarn", "position.factor": 4.0}
    model, scales = Model(override(tiny_config("softmax_rope"), changes), VOCAB), []

    def first_layer(params):
        _, mixer, x, context = next(iter(model.bind(params).layer_inputs(jnp.zeros((1, 4), jnp.int32))))
        scales.append(mixer.kernel_inputs(x, context)[3])

    jax.eval_shape(lambda key: first_layer(model.init(key)), jax.random.key(0))
    assert scales == [pytest.approx((0.1 * math.log(4) + 1) ** 2 / 4)]


def test_dynamic_ntk_depends_on_the_length_of_the_stream():
    config = override(tiny_config("softmax_rope"), {"position.scaling": "dynamic_ntk", "position.factor": "4.0"})
    model = Model(config, VOCAB)
    params = model.init(jax.random.key(0))
    x = jnp.arange(24, dtype=jnp.int32)[None] % VOCAB
    near, _ = model.logits(params, x)
    same, _ = model.logits(params, x, length=24)
    far, _ = model.logits(params, x, length=96)
    assert model.depends_on_length
    np.testing.assert_array_equal(near, same)
    assert np.abs(np.asarray(far - near)).max() > 1e-6
