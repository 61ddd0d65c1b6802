"""Schedules by hand, parameter groups by name, and what Muon, z-loss and accumulation do to one step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model
from sympow_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    parameter_groups,
    weight_decay_mask,
)
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import TrainState
from tests.models.small import VOCAB, tiny_config


def flat(tree) -> dict:
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("constant", {10: 1.0, 55: 1.0, 100: 1.0}),
        ("linear", {10: 1.0, 55: 0.6, 100: 0.2}),
        ("cosine", {10: 1.0, 55: 0.6, 100: 0.2}),
        ("wsd", {10: 1.0, 70: 1.0, 85: 0.6, 100: 0.2}),
    ],
)
def test_schedules_by_hand(name, want):
    """100 steps with 10 of warm-up, down to a fifth; wsd falls in the last 30."""
    flags = ("learning_rate=1.0", "warmup_steps=10", "final_fraction=0.2", "decay_fraction=0.3", f"schedule={name}")
    config = tiny_config("sympow", "num_train_steps=100", *(f"optimizer.{flag}" for flag in flags)).optimizer
    schedule = learning_rate_schedule(config, 100)
    for step, value in {0: 0.0, 5: 0.5, **want}.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["schedule=wsd", "decay_fraction=0.9"], "wsd does not fit into num_train_steps = 100"),
        (["decay_fraction=1.5"], "decay_fraction = 1.5: a fraction is at most 1"),
        (["name=moun"], "did you mean 'muon'"),
        (["schedule=wds"], "did you mean 'wsd'"),
        (["z_loss=-1.0"], "z_loss = -1.0: must be at least 0"),
    ],
)
def test_wrong_settings_are_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_config("sympow", "num_train_steps=100", *(f"optimizer.{flag}" for flag in flags))
    assert "\n" not in str(error.value)


def test_groups_name_every_kind_of_parameter():
    conformal = flat(parameter_groups(shapes("conformal_sympow")))
    mixer = "blocks_0/mixer/"
    assert {name for name, group in conformal.items() if group == "matrix"} == {
        *(f"{mixer}{name}/kernel" for name in ("query", "key", "value", "out")),
        "blocks_0/mlp/up/kernel", "blocks_0/mlp/down/kernel",
    }  # fmt: skip
    assert [name for name, group in conformal.items() if group == "table"] == ["embedding/embedding"]
    assert conformal[f"{mixer}gate/kernel"] == conformal[f"{mixer}beta/kernel"] == "other"
    hybrid = flat(parameter_groups(shapes("based")))
    assert hybrid["blocks_0/mixer/kernel"] == "other" and hybrid["blocks_0/mixer/input/kernel"] == "matrix"
    decayed = flat(weight_decay_mask(shapes("conformal_sympow")))
    assert all(decayed[name] == (group != "other") for name, group in conformal.items())


def shapes(variant: str):
    return jax.eval_shape(Model(tiny_config(variant), VOCAB).init, jax.random.key(0))


def one_update(name: str, params, grads, **changes):
    config = dataclasses.replace(
        tiny_config("sympow").optimizer, name=name, warmup_steps=0, schedule="constant", clip_norm=0.0, **changes
    )
    optimizer = make_optimizer(config, 100)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes both
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_the_rest_to_adamw(rng):
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes("conformal_sympow"))
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    update = flat(one_update("muon", params, grads, learning_rate=1.0, weight_decay=0.0))
    adamw = flat(one_update("adamw", params, grads, learning_rate=1.0, weight_decay=0.0))
    for name, group in flat(parameter_groups(params)).items():
        if group != "matrix":
            np.testing.assert_allclose(update[name], adamw[name], rtol=1e-6)
            continue
        scale = 0.2 * max(update[name].shape[-2:]) ** 0.5
        for layer in np.asarray(update[name]):  # one of the stack at a time: singular values near 1
            singular = np.linalg.svd(layer / scale, compute_uv=False)
            assert singular.min() > 0.5 and singular.max() < 1.3, (name, singular)


def test_weight_decay_reaches_matrices_and_tables_only(rng):
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), shapes("conformal_sympow"))
    grads = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "muon", "adam"):
        update = flat(one_update(name, params, grads, learning_rate=0.5, weight_decay=0.1))
        for path, group in flat(parameter_groups(params)).items():
            want = 0.0 if group == "other" or name == "adam" else -0.05
            np.testing.assert_allclose(update[path], want, atol=1e-7, err_msg=f"{name} {path}")


class OneLayer:
    """Stands for a model: logits are a table looked up by token, so that losses can be written down."""

    mesh = None

    def losses(self, params, inputs, targets, *, segment_ids=None, positions=None):
        logits = params["table"][inputs]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z


def sgd_step(params, batch, **options):
    optimizer = optax.sgd(1.0)
    zero = jnp.int32(0)
    state = TrainState(zero, jax.tree.map(jnp.copy, params), optimizer.init(params), zero + 0, zero + 0, jnp.float32(0))
    return make_train_step(OneLayer(), optimizer, optax.constant_schedule(1.0), **options)(state, batch)


def test_z_loss_and_accumulation_by_hand(rng):
    params = {"table": jnp.asarray(rng.normal(size=(7, 7)), jnp.float32)}
    batch = {
        "inputs": rng.integers(0, 7, (4, 6)).astype(np.int32),
        "targets": rng.integers(0, 7, (4, 6)).astype(np.int32),
        "loss_mask": (rng.random((4, 6)) < 0.7).astype(np.float32),
    }

    def objective(table, weight):
        nll, log_z = OneLayer().losses({"table": table}, batch["inputs"], batch["targets"])
        return jnp.sum((nll + weight * log_z**2) * batch["loss_mask"]) / batch["loss_mask"].sum()

    for weight in (0.0, 0.3):
        want = params["table"] - jax.grad(objective)(params["table"], weight)
        for steps in (1, 2, 4):
            state, metrics = sgd_step(params, batch, accumulation_steps=steps, z_loss=weight)
            np.testing.assert_allclose(state.params["table"], want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(metrics["loss"], objective(params["table"], 0.0), rtol=1e-6)
