"""Gates, norms and encodings on kernels that no named variant combines, and where their parameters start."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.config import ConfigError, override
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.variants import BIAS_POSITIONS, GATES, KERNELS, POSITIONS
from tests.models.small import VOCAB, moved, tiny_config

T = 24
pytestmark = pytest.mark.quick

GROUPED = ("model.num_heads=4", "model.num_kv_heads=2")
OPTIONS = {
    "power-alibi-grouped": ("sympow", "attention.position=alibi", *GROUPED),
    "power-learned-gate": ("sympow", "attention.gate=learned", "attention.gate_init=timescales"),
    "power-qk_norm-output_gate": ("sympow_gated", "attention.qk_norm=true", "attention.output_gate=true"),
    "taylor-fixed-gate": ("based", "attention.gate=fixed"),
    "rebased-concatenated": ("rebased", "attention.rebased_norm=concatenated", "attention.gate=data"),
    "softmax-learned-gate": ("softmax_rope", "attention.gate=learned"),
    "softmax-qk_norm-output_gate": ("fox", "attention.qk_norm=true", "attention.output_gate=true"),
    "softmax-manifest": ("softmax_rope", "position.convention=manifest"),
    "power-fire": ("sympow", "attention.position=fire"),
    "power-conformal-grouped": ("conformal_sympow", *GROUPED),
    "softmax-conformal-grouped": ("conformal_softmax", *GROUPED),
    "based-grouped": ("based", *GROUPED),
    "taylor-frequency-grouped": ("based", "attention.position=learned_rope", "position.rotation=frequency", *GROUPED),
    "softmax-frequency-partial": ("selective_rope", "position.rotary_fraction=0.5", *GROUPED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree_with_the_reference_and_stream(name):
    """Loss and all gradients in the fast form, and the logits of a stream, are those of one dense pass."""
    config = resolve_implementation(tiny_config(*OPTIONS[name], "attention.chunk_size=10", f"position.max_length={T}"))
    form = "chunked" if config.attention.kernel != "softmax" and name != "power-fire" else "blockwise"
    x = np.random.default_rng(3).integers(0, VOCAB, (2, T)).astype(np.int32)
    params = None

    def run(implementation):
        nonlocal params
        model = Model(override(config, {"attention.implementation": implementation}), VOCAB)
        if params is None:
            params = jax.tree.map(lambda p: p + 0.05 * np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape),
                                  model.init(jax.random.key(1)))  # fmt: skip

        def loss(p):
            logits, _ = model.logits(p, x)
            return jnp.mean(jnp.square(logits)), logits

        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return model, value, logits, grads

    _, want_loss, want_logits, want = run("reference")
    model, loss, _, grads = run(form)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        assert error < 2e-3, f"{jax.tree_util.keystr(path)}: {error}"
    if name == "power-fire":
        with pytest.raises(ValueError, match="no finite state"):
            model.initial_state(2, T)
        return
    state, parts = model.initial_state(2, T), []
    stream = jax.jit(model.logits)
    for start, stop in ((0, 22), (22, 23), (23, 24)):
        part, state = stream(params, x[:, start:stop], state=state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), want_logits, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_takes_every_position_with_every_gate(kernel):
    """The loss can be traced with grouped queries and packed documents."""
    for (number, position), gate in itertools.product(enumerate(POSITIONS), GATES):
        if number % len(GATES) != GATES.index(gate) and position != "alibi":
            continue  # each position with one gate, in turn
        flags = (f"attention.kernel={kernel}", f"attention.position={position}", f"attention.gate={gate}")
        if gate == "vector" and (kernel == "softmax" or position in BIAS_POSITIONS):
            with pytest.raises(ConfigError, match=r"attention\.gate = 'vector'"):
                resolve_implementation(tiny_config("softmax_nope", *flags, *GROUPED))
            continue
        model = Model(resolve_implementation(tiny_config("softmax_nope", *flags, *GROUPED)), VOCAB)
        params = jax.eval_shape(model.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, T), jnp.int32)
        nll, _ = jax.eval_shape(lambda p, x, m=model: m.nll(p, x, x, segment_ids=x, positions=x), params, x)
        assert nll.shape == x.shape, (position, gate)


@pytest.mark.slow
def test_alibi_on_a_linear_kernel_is_a_gate(rng):
    """The chunked form with ALiBi's gates is the dense form with ALiBi's bias."""
    q, k, v = jnp.asarray(rng.normal(size=(3, 1, T, 2, 8)), jnp.float32)
    bias = ops.positions.alibi_bias(jnp.asarray(ops.positions.alibi_slopes(2), jnp.float32))
    want = ops.power_attention(q, k, v, bias=bias, implementation="reference")
    found = ops.power_attention(
        q, k, v, log_gates=ops.gates.fixed_log_gates(2, 1, T), implementation="chunked", chunk_size=7
    )
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "flags", "gate"),
    [
        ("fox", (), [0.5, 0.5]),
        ("conformal_sympow", (), [0.999, 0.999]),
        pytest.param("sympow", ("attention.gate=learned",), [0.999, 0.999], marks=pytest.mark.slow),
        (  # ALiBi is a gate more, exp(-slope), of slopes 1 / 16 and 1 / 256
            "sympow",
            ("attention.gate=learned", "attention.position=alibi"),
            [0.999 * np.exp(-1 / 16), 0.999 * np.exp(-1 / 256)],
        ),
        ("fox", ("attention.gate_init=timescales",), [np.exp(-1 / 16), np.exp(-1 / 4096)]),
        pytest.param(
            "softmax_nope", ("attention.gate=fixed",), [np.exp(-1 / 16), np.exp(-1 / 4096)], marks=pytest.mark.slow
        ),
    ],
)
def test_gates_start_where_the_config_says(variant, flags, gate):
    """At an input of zero, where a data-dependent gate is its bias."""
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    bound = model.bind(model.init(jax.random.key(0)))
    _, mixer, x, _ = next(bound.layer_inputs(jnp.zeros((1, 3), jnp.int32)))
    np.testing.assert_allclose(np.exp(mixer.log_gates(jnp.zeros_like(x)))[0], [gate] * 3, rtol=1e-5)


def test_padding_of_a_stream_has_a_position():
    """A stream that is padded beyond the table gives no NaN."""
    model = Model(resolve_implementation(tiny_config("softmax_absolute")), VOCAB)
    tokens = jnp.zeros((1, 32), jnp.int32)
    params, state = model.init(jax.random.key(0)), model.initial_state(1, 64)
    for _ in range(2):
        logits, state = model.logits(params, tokens, state=state, length=64)
    assert np.isfinite(logits).all()


def test_learned_positions_end_where_their_table_does():
    """A longer context is one line, not the rows of another position."""
    model = Model(resolve_implementation(tiny_config("softmax_absolute")), VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="length 49: learned_absolute has positions for 48 tokens; use at most 48"):
        jax.eval_shape(model.logits, params, jax.ShapeDtypeStruct((1, 49), jnp.int32))


def parts_of(model: Model, *, segment_ids: bool) -> tuple[jax.Array, jax.Array]:
    """The logits of the last 4 of T tokens: of the whole, and of a stream whose second part may name its document."""
    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).integers(0, VOCAB, (2, T)).astype(np.int32)
    _, state = model.logits(params, x[:, :20], state=model.initial_state(2, T))
    ids = {"segment_ids": jnp.ones((2, 4), jnp.int32)} if segment_ids else {}
    return model.logits(params, x)[0][:, 20:], model.logits(params, x[:, 20:], state=state, **ids)[0]


def test_a_stream_without_ids_is_the_document_1():
    """Of the kernel's state and of the learned positions, which are counted apart."""
    model = Model(resolve_implementation(tiny_config("conformal_sympow")), VOCAB)
    for segment_ids in (False, True):
        whole, streamed = parts_of(model, segment_ids=segment_ids)
        np.testing.assert_allclose(streamed, whole, atol=3e-5)


def test_a_form_that_is_named_is_the_form_of_streams_too(monkeypatch):
    named, attend = [], ops.linear_attention_with_state

    def attend_and_tell(*arguments, implementation, **options):
        named.append(implementation)
        return attend(*arguments, implementation=implementation, **options)

    monkeypatch.setattr("sympow_jax.layers.attention.ops.linear_attention_with_state", attend_and_tell)
    parts_of(Model(tiny_config("sympow", "attention.implementation=reference"), VOCAB), segment_ids=False)
    assert set(named) == {"reference"}


@pytest.mark.parametrize("num_tokens", [4, 20])
def test_features_of_a_stream_have_their_layers(num_tokens):
    model = Model(resolve_implementation(tiny_config("sympow_gated")), VOCAB)
    params, x = model.init(jax.random.key(0)), np.arange(2 * num_tokens, dtype=np.int32).reshape(2, -1) % VOCAB
    whole = model.features(params, x, with_layers=True).layers
    layers = model.features(params, x, with_layers=True, state=model.initial_state(2, T)).layers
    assert len(layers) == len(whole) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), layers, whole)


def test_features_of_a_stream_scale_positions_as_its_logits_do():
    flags = ("position.scaling=dynamic_ntk", "position.factor=4.0", "position.original_length=8")
    model = Model(tiny_config("softmax_rope", *flags), VOCAB)
    params = jax.tree.map(jnp.asarray, moved(model.init(jax.random.key(0)), 0.3))
    x = np.arange(T, dtype=np.int32)[None] % VOCAB
    _, state = model.logits(params, x[:, :20], state=model.initial_state(1, T))
    features = model.features(params, x[:, 20:], state=state)
    logits, _ = model.logits(params, x[:, 20:], state=state)
    np.testing.assert_allclose(features.hidden @ features.kernel, logits, rtol=1e-5, atol=1e-5)
