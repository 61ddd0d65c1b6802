"""Layers of different kinds in one model: what each is, what it costs and keeps, and what does not go together."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from sympow_jax.config import ConfigError, describe_layers, layer_specs
from sympow_jax.loading import check_stream, evaluation_config
from sympow_jax.models import flops
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.models.state_bytes import describe_state, state_bytes
from sympow_jax.training.config_mesh import config_mesh
from tests.models.small import ROOT, VOCAB, moved, tiny_config

HYBRID = "attention.layer_pattern=conformal_sympow,conformal_sympow,conformal_sympow,softmax_nope"


def test_each_layer_has_the_axes_of_its_word_in_the_pattern():
    """A row has its own; `attention` and `window` have those of the config."""
    pattern = "attention.layer_pattern=conformal_sympow,attention,window,short_conv,fox"
    config = tiny_config("softmax_rope", pattern, "model.num_layers=6", "attention.gate=learned")
    found = [(s.mixer, s.attention.kernel, s.attention.position, s.attention.gate, s.attention.gate_init, s.window)
             for s in layer_specs(config)]  # fmt: skip
    conformal = ("attention", "power", "learned_rope", "data", "long", None)
    assert found[:3] == [
        conformal,
        ("attention", "softmax", "rope", "learned", "long", None),
        ("attention", "softmax", "rope", "learned", "long", 8),
    ]
    assert found[3][0] == "short_conv"
    assert found[4:] == [("attention", "softmax", "none", "data", "zero", None), conformal]


def test_a_setting_reaches_the_layers_that_read_it():
    """YaRN scales the layers with rope, and a linear form is that of the linear kernels."""
    flags = ("position.scaling=yarn", "position.factor=4", "attention.implementation=chunked")
    conformal, rope, taylor = layer_specs(tiny_config("hybrid", *flags))
    assert [s.position.scaling for s in (conformal, rope, taylor)] == ["none", "yarn", "none"]
    assert [s.attention.implementation for s in (conformal, rope, taylor)] == ["chunked", "auto", "chunked"]
    assert [s.qk_head_dim(tiny_config("hybrid").model) for s in (conformal, rope, taylor)] == [16, 16, 4]


@pytest.mark.parametrize(
    ("pattern", "flags", "message"),
    [
        ("sympow,softmax_absolute", (), r"learned_absolute is added to the embeddings.*'rope'; give all of them"),
        ("attention,softmax_nope", ("attention.position=sinusoidal",), r"sinusoidal is added .* position 'none'"),
        ("softmax_fire_shared,softmax_fire", (), r"fire_shared is one bias of all layers, .* position 'fire'"),
        ("sympow,simpow", (), r"has 'simpow': .* or a variant; did you mean 'sympow'"),
        ("", (), r"attention.layer_pattern = \(\): name one or more kinds"),
        ("sympow,rebased", ("attention.qk_norm=true",), r"attention.qk_norm = True: rebased normalises"),
        ("softmax_nope,fox", ("attention.implementation=chunked",), r"softmax has no linear form"),
        ("sympow,fox", ("position.scaling=dynamic_ntk",), r"dynamic_ntk.*finite state"),
        ("conformal_sympow,fox", ("position.scaling=yarn",), r"attention.position is one of 'learned_rope', 'none'"),
        ("softmax_fire,attention", ("attention.kernel=power", "attention.position=fire",
                                    "attention.implementation=chunked"), r"fire is an additive bias"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(pattern, flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_config("softmax_nope", f"attention.layer_pattern={pattern}", *flags)
    assert "\n" not in str(error.value)


def test_a_pattern_of_one_row_is_that_variant():
    """Nothing but the name differs, whatever the variant that the pattern replaces."""
    plain, row = tiny_config("sympow_gated"), tiny_config("softmax_absolute", "attention.layer_pattern=sympow_gated")
    assert [dataclasses.replace(spec, name="attention") for spec in layer_specs(row)] == [*layer_specs(plain)]
    shapes = [jax.eval_shape(Model(config, VOCAB).init, jax.random.key(0)) for config in (plain, row)]
    assert shapes[0] == shapes[1]


def test_a_hybrid_streams_through_states_and_a_cache():
    """In chunks and tokens, as in one pass."""
    pattern = "attention.layer_pattern=conformal_sympow,softmax_nope"
    model = Model(resolve_implementation(tiny_config("fox", pattern)), VOCAB)
    params = moved(model.init(jax.random.key(1)), 0.1)
    x = np.random.default_rng(3).integers(0, VOCAB, (2, 24)).astype(np.int32)
    run, state, parts = jax.jit(model.logits), model.initial_state(2, 24), []
    for tokens in np.split(x, (12, 23), axis=1):
        part, state = run(params, tokens, state=state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), run(params, x)[0], rtol=2e-4, atol=2e-4)
    assert model.streams and not model.streams_constant


def test_a_state_does_not_grow_with_the_stream_and_a_cache_does():
    model = Model(tiny_config("conformal_sympow", HYBRID, "model.num_layers=4"), VOCAB)
    shapes = [jax.eval_shape(lambda n=n: model.initial_state(1, n)) for n in (24, 240)]
    conformal = 3 * (2 * (136 * 17 * 4 + 4 + 4) + 8)  # two heads of P = 136 features and a phase; two segment ids
    cache = 24 * (2 * (16 + 16) * 4 + 4)
    assert state_bytes(model.config, shapes[0]) == {"conformal_sympow": conformal, "softmax_nope": cache}
    assert state_bytes(model.config, shapes[1]) == {"conformal_sympow": conformal, "softmax_nope": 10 * cache}
    described = f"conformal_sympow {conformal:,} (constant), softmax_nope {cache:,} (cache)"
    assert describe_state(model.config, shapes[0]) == described


def test_a_hybrid_costs_what_its_layers_do():
    """P = 136 of degree 2 at head_dim 16, P = 15 of Taylor at 4; softmax T (D + Dv)."""
    config = tiny_config("hybrid", "attention.implementation=chunked")
    want = 2 * (4 * 136 * 17 + 24 * (16 + 16) + 4 * 15 * 17)
    assert flops.attention_flops_per_token(config, 24) == want
    assert describe_layers(config) == (
        "1 x conformal_sympow (kernel power, position learned_rope, gate data); "
        "1 x softmax_rope (kernel softmax, position rope, gate none); "
        "1 x based (kernel taylor, position none, gate none)"
    )
    assert describe_layers(tiny_config("fox")) == "kernel softmax, position none, gate data"


def test_rows_of_a_pattern_rotate_as_each_of_them_does_unless_the_config_says():
    pattern = "attention.layer_pattern=conformal_sympow,selective_rope,attention,fox"
    each = {"variant": "scalar frequency frequency scalar", "scalar": "scalar scalar scalar scalar"}
    for rotation, want in (each | {"frequency": "frequency frequency frequency scalar"}).items():
        flags = (pattern, "model.num_layers=4", f"position.rotation={rotation}")
        config = tiny_config("conformal_vector_sympow", *flags)
        assert [spec.position.rotation for spec in layer_specs(config)] == want.split()
    config = tiny_config("conformal_vector_sympow", "attention.position=rope")
    assert config.position.rotation == "scalar"
    described = "kernel softmax, position learned_rope (frequency), gate none"
    assert describe_layers(tiny_config("selective_rope")) == described


def test_the_form_of_a_hybrid_is_that_of_its_linear_kernels():
    """Taylor's 15 features pay at 1,000 tokens, the 136 of degree 2 too; one bias keeps all of them quadratic."""
    assert resolve_implementation(tiny_config("hybrid", "data.seq_len=1000")).attention.implementation == "chunked"
    flags = ("attention.layer_pattern=sympow,attention", "attention.kernel=power", "attention.position=fire")
    config = resolve_implementation(tiny_config("fox", *flags, "data.seq_len=1000"))
    assert config.attention.implementation == "blockwise" and not Model(config, VOCAB).streams


def test_a_hybrid_is_cut_and_evaluated_by_what_any_of_its_layers_needs():
    with pytest.raises(ConfigError, match=r"data.seq_len = 24: must be a multiple of 16"):  # halves, for softmax
        config_mesh(tiny_config("hybrid", "mesh.seq=8", "mesh.data=1"))
    config = resolve_implementation(tiny_config("hybrid", "attention.implementation=chunked"))
    overrides = {"position.scaling": "yarn", "position.factor": "8", "attention.chunk_size": "8"}
    assert evaluation_config(config, overrides).attention.chunk_size == 8
    check_stream(evaluation_config(config, {"attention.implementation": "recurrent"}), {"attention.implementation": ""})
    with pytest.raises(ConfigError, match=r"no effect with attention.layer_pattern = \('conformal_sympow', "):
        evaluation_config(config, {"position.alibi_slope_scale": "1"})


def test_nobody_asks_the_whole_model_for_what_a_layer_has():
    """Those of `config.attention` are of the words `attention` and `window` alone."""
    asks = re.compile(r"config\.attention\.(kernel|position|gate|layer_pattern|window|is_linear\b|has_additive|uses_)")
    allowed = {"config/layer_specs.py", "config/architecture.py", "convert/architecture.py", "loading.py"}
    package = pathlib.Path(ROOT) / "sympow_jax"
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if asks.search(path.read_text())
    } - allowed
    assert not found
