"""optimizer.freeze and optimizer.learning_rates: which parameters they name, and what that does to them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.training.optimizer import make_optimizer
from sympow_jax.training.patterns import check_patterns, rate_factors, stop_frozen
from tests.models.small import tiny_config

CONFIG = tiny_config("sympow_gated").optimizer
GATE, UP = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((2, 3, 3))}
PARAMS = {"blocks_0": {"mixer": {"gate": GATE}, "mlp": {"up": UP}}, "embedding": {"embedding": jnp.ones((5, 3))}}


def settings(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_frozen_have_no_state_and_stay_and_the_others_move(name):
    config = settings(freeze=("layers/*/mlp/*", "embedding/*"), warmup_steps=0, name=name)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(PARAMS)
    assert not [x for x in jax.tree.leaves(state) if x.shape in ((2, 3, 3), (5, 3))]
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(PARAMS, state, PARAMS, step=jnp.int32(1))
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved["blocks_0"] == {"mixer": {"gate": {"kernel": True}}, "mlp": {"up": {"kernel": False}}}
    assert moved["embedding"] == {"embedding": False}


def test_the_frozen_have_no_gradient():
    grads = jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(stop_frozen(settings(freeze=("emb*",)), p))))(
        PARAMS
    )
    assert not jnp.any(grads["embedding"]["embedding"]) and jnp.all(grads["blocks_0"]["mlp"]["up"]["kernel"] == 1)


def test_a_rate_is_that_of_the_first_pattern_in_proportion_to_the_schedule():
    config = settings(learning_rates=("*gate*=1e-2", "layers/*=1e-4"), learning_rate=1e-3, warmup_steps=4)
    factors = rate_factors(config, PARAMS)
    assert [*map(float, jax.tree.leaves(factors))] == pytest.approx([10, 0.1, 1])
    plain, optimizer = (make_optimizer(c, 10) for c in (settings(learning_rate=1e-3, warmup_steps=4), config))
    with jax.numpy_dtype_promotion("standard"):
        want, have = (o.update(PARAMS, o.init(PARAMS), PARAMS, step=jnp.int32(2))[0] for o in (plain, optimizer))
    want = jax.tree.map(lambda u, factor: u * factor, want, factors)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("layers/0/mlp/*",)}, r"optimizer.freeze: no parameter is named 'layers/0/mlp/\*'"),
        ({"learning_rates": ("embeding/embeding=1",)}, "did you mean 'embedding/embedding'"),
        ({"freeze": ("*",)}, r"optimizer.freeze = \*: leaves no parameter to train"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(changes, words):
    check_patterns(CONFIG, PARAMS)
    with pytest.raises(ConfigError, match=words):
        check_patterns(settings(**changes), PARAMS)
