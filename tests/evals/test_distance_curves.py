"""Curves of biases and gates against distance, as eval.py writes and draws them."""

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import ops
from sympow_jax.evals.distance_curves import distance_curves
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.plots.distance_curves import distance_figure
from tests.models.small import VOCAB, tiny_config


def curves_of(variant, *flags, query_position=99):
    model = Model(resolve_implementation(tiny_config(variant, *flags)), VOCAB)
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 24))
    return distance_curves(model, params, tokens, query_position=query_position), params


def test_a_learned_bias_is_drawn_per_head_and_layer():
    curves, params = curves_of("softmax_fire")
    assert [layer["layer"] for layer in curves["layers"]] == [0, 1]
    assert curves["distance"][0] == 0 and curves["distance"][-1] == 99
    for layer in curves["layers"]:
        own = jax.tree.map(lambda x, n=layer["layer"]: x[n], params["blocks_0"]["mixer"]["bias_parameters"])
        distance = jnp.asarray(curves["distance"], jnp.int32)
        want = ops.positions.learned_bias("fire", own)(jnp.asarray([99], jnp.int32), 99 - distance)
        np.testing.assert_allclose(layer["log_weight"], np.asarray(want)[:, 0], rtol=1e-4, atol=1e-5)
    figure = distance_figure(curves)
    assert [len(panel.get_lines()) >= 2 for panel in figure.axes[:2]] == [True, True]


def test_gates_fall_linearly_with_distance_and_alibi_adds_its_slope():
    curves, _ = curves_of("sympow", "attention.position=alibi", "attention.gate=learned")
    slopes = np.asarray(ops.positions.alibi_slopes(2)) - np.log(0.999)
    for layer in curves["layers"]:
        want = -slopes[:, None] * np.asarray(curves["distance"])
        np.testing.assert_allclose(layer["log_weight"], want, rtol=1e-4, atol=1e-5)


def test_gates_of_every_dim_that_forget_all_have_a_finite_curve():
    """The mean of the dims' decays, whose logarithm is that of the slowest where the others are nothing."""
    curves, _ = curves_of("conformal_vector_sympow", "attention.gate_init=timescales", query_position=65_535)
    for layer in curves["layers"]:
        values = np.asarray(layer["log_weight"], np.float64)
        assert np.isfinite(values).all() and values.min() < -100


def test_nothing_is_drawn_without_bias_or_gate():
    assert curves_of("softmax_rope")[0]["layers"] == []
