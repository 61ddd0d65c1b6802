"""Schedules by hand, parameter groups by name, and what Muon, z-loss and accumulation do to one step."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sympow_jax.config import ConfigError, flatten
from sympow_jax.config.checks import check_values
from sympow_jax.models.model import Model
from sympow_jax.training import step
from sympow_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    parameter_groups,
    weight_decay_mask,
)
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import TrainState
from tests.models.small import VOCAB, tiny_config
from tests.training.test_bad_steps import PARAMS, Linear


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def flat(tree) -> dict:
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# The rate of each of 10 steps that end at a fifth; with and without 4 of warm-up; wsd falls in the last 3.
COSINE = {4: (0.9464102, 0.8, 0.6, 0.4, 0.2535898, 0.2), 0: (0.9804226, 0.9236068, 0.8351141, 0.7236068)}
RATES = {
    ("constant", 0): (1.0,) * 10,
    ("linear", 0): (0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28, 0.2),
    ("cosine", 0): (*COSINE[0], 0.6, 0.4763932, 0.3648859, 0.2763932, 0.2195774, 0.2),
    ("wsd", 0): (1.0,) * 7 + (0.7333333, 0.4666667, 0.2),
    ("constant", 4): (0.25, 0.5, 0.75, 1.0) + (1.0,) * 6,
    ("linear", 4): (0.25, 0.5, 0.75, 1.0, 0.8666667, 0.7333333, 0.6, 0.4666667, 0.3333333, 0.2),
    ("cosine", 4): (0.25, 0.5, 0.75, 1.0, *COSINE[4]),
    ("wsd", 4): (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.7333333, 0.4666667, 0.2),
}
LONGER = {  # steps 11 to 14, when there are 14
    ("linear", 4): (0.44, 0.36, 0.28, 0.2),
    ("cosine", 4): (0.3648859, 0.2763932, 0.2195774, 0.2),
    ("wsd", 0): (0.8, 0.6, 0.4, 0.2),
}


def rate_config(schedule: str, warmup: int, steps: int = 10):
    flags = {"learning_rate": 1.0, "warmup_steps": warmup, "final_fraction": 0.2, "decay_fraction": 0.3}
    flags |= {"schedule": schedule, "name": "adam", "clip_norm": 0.0}
    return tiny_config("sympow", f"num_train_steps={steps}", *(f"optimizer.{k}={v}" for k, v in flags.items()))


@pytest.mark.parametrize(("name", "warmup"), RATES)
def test_rates_by_hand(name, warmup):
    schedule = learning_rate_schedule(rate_config(name, warmup).optimizer, 10)
    got = [float(schedule(step)) for step in range(1, 11)]
    np.testing.assert_allclose(got, RATES[name, warmup], atol=1e-6)
    if name != "constant":
        assert got[-1] == np.float32(0.2)


def test_a_run_shorter_than_its_warmup_ends_within_it():
    schedule = learning_rate_schedule(rate_config("cosine", 4, 3).optimizer, 3)
    assert [float(schedule(step)) for step in (1, 2, 3)] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(("schedule", "warmup"), LONGER)
def test_the_rate_applied_is_the_rate_logged_also_after_skipped_steps_and_with_more_steps(schedule, warmup):
    """Adam's update under a constant gradient is the rate itself. Steps 3, 7 and 12 have no finite gradient."""
    logged, applied, state = [], [], None
    for first, last in ((1, 6), (7, 10), (11, 14)):  # a resume at 7, and one with more steps at 11
        model = Linear(rate_config(schedule, warmup, max(last, 10)), vocab_size=1)
        optimizer, train_step = make_optimizer(model.config.optimizer, last), make_train_step(model)
        if state is None:
            params, zero = jax.tree.map(jnp.copy, PARAMS), jnp.int32(0)
            state = TrainState(zero, params, optimizer.init(params), zero + 0, zero + 0, jnp.float32(0))
        for number in range(first, last + 1):
            before = float(state.params["a"]["kernel"])
            gradient = np.inf if number in (3, 7, 12) else 1.0
            batch = {"inputs": np.full((2, 3), gradient, np.float32), "targets": np.zeros((2, 3), np.float32)}
            state, metrics = train_step(state, batch)
            logged.append(float(metrics["learning_rate"]))
            applied.append(before - float(state.params["a"]["kernel"]))
    want = np.array([*RATES[schedule, warmup], *LONGER[schedule, warmup]])
    np.testing.assert_allclose(logged, want, atol=1e-6)
    want[[2, 6, 11]] = 0.0
    np.testing.assert_allclose(applied, want, atol=2e-6)
    assert int(state.step) == 14 and int(state.skipped) == 3


class OneMatrix(Model):
    """Stands for a model: the gradient with respect to each entry of a matrix is 1e-10 times the mean input."""

    def losses(self, params, inputs, targets, *, segment_ids=None, positions=None):
        nll = inputs * (1e-10 * params["mlp"]["kernel"]).sum()
        return nll, jnp.zeros_like(nll)


def test_muon_applies_the_rate_logged_and_no_update_that_is_not_finite():
    """Under one direction of gradients the update is the rate times a constant; here it ends beyond float32."""
    config = rate_config("linear", 0)
    optimizer = dataclasses.replace(config.optimizer, name="muon", learning_rate=1e38, weight_decay=0.0)
    model = OneMatrix(dataclasses.replace(config, optimizer=optimizer), vocab_size=1)
    params = {"mlp": {"kernel": jnp.full((2, 2), -3.1e38)}}
    zero = jnp.int32(0)
    opt_state = make_optimizer(model.config.optimizer, 10).init(params)
    state = TrainState(zero, params, opt_state, zero + 0, zero + 0, jnp.float32(0))
    train_step, applied, beyond = make_train_step(model), [], []
    for number in range(1, 11):
        before = np.asarray(state.params["mlp"]["kernel"], np.float64)
        gradient = np.inf if number == 2 else 1e7
        batch = {"inputs": np.full((2, 3), gradient, np.float32), "targets": np.zeros((2, 3), np.float32)}
        state, metrics = train_step(state, batch)
        after = np.asarray(state.params["mlp"]["kernel"], np.float64)
        assert np.isfinite(after).all()
        applied.append((before - after).mean() / 1e38 / RATES["linear", 0][number - 1])
        beyond.append(int(metrics["bad_gradient"]) == -1 and int(metrics["bad_parameter"]) == 0)
    last = beyond.index(True)
    assert last > 2 and all(beyond[last:]) and int(state.skipped) == 1 + sum(beyond)
    assert applied[1] == 0 and applied[last:] == [0] * (10 - last)
    constant = 0.2 * 2**0.5 / 2  # of the orthogonalised direction, all halves, and the scale of a 2 x 2 matrix
    np.testing.assert_allclose(np.array(applied[:last])[[0, *range(2, last)]] / applied[0], 1, rtol=1e-3)
    assert 0.5 < applied[0] / constant < 1.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["schedule=wsd", "decay_fraction=0.9"], "wsd does not fit into num_train_steps = 100"),
        (["decay_fraction=1.5"], "decay_fraction = 1.5: a fraction is at most 1"),
        (["name=moun"], "did you mean 'muon'"),
        (["schedule=wds"], "did you mean 'wsd'"),
        (["z_loss=-1.0"], "z_loss = -1.0: must be at least 0"),
        (["b2=1.0"], "b2 = 1.0: must be below 1"),
        (["b1=0.99999999"], "b1 = 0.99999999: must be below 1 also in float32"),
        (["eps=1e-60"], "eps = 1e-60: is 0 in float32"),
    ],
)
def test_wrong_settings_are_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_config("sympow", "num_train_steps=100", *(f"optimizer.{flag}" for flag in flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39])
def test_no_float_of_the_config_may_be_infinite_or_no_number(value):
    keys = [key for key, known in flatten(tiny_config("sympow")).items() if type(known) is float]
    assert len(keys) > 15 and {"optimizer.learning_rate", "optimizer.z_loss", "optimizer.clip_norm"} < {*keys}
    for key in keys:
        with pytest.raises(ConfigError, match=rf"{key} = {value}: must be a finite number".replace("+", r"\+")):
            check_values({key: value})


def test_groups_name_every_kind_of_parameter():
    conformal = flat(parameter_groups(shapes("conformal_sympow")))
    mixer = "blocks_0/mixer/"
    assert {name for name, group in conformal.items() if group == "matrix"} == {
        *(f"{mixer}{name}/kernel" for name in ("query", "key", "value", "out")),
        "blocks_0/mlp/up/kernel", "blocks_0/mlp/down/kernel",
    }  # fmt: skip
    assert [name for name, group in conformal.items() if group == "table"] == ["embedding/embedding"]
    assert conformal[f"{mixer}gate/kernel"] == conformal[f"{mixer}beta/kernel"] == "other"
    each = flat(parameter_groups(shapes("selective_rope")))
    assert each[f"{mixer}beta_down/kernel"] == each[f"{mixer}beta_up/kernel"] == "other"
    hybrid = flat(parameter_groups(shapes("based")))
    assert hybrid["blocks_0/mixer/kernel"] == "other" and hybrid["blocks_0/mixer/input/kernel"] == "matrix"
    options = ("attention.bias=all", "attention.qk_norm=true", "model.mlp=geglu", "model.mlp_bias=all")
    gated = flat(parameter_groups(shapes("softmax_rope", *options, "model.norm_placement=sandwich")))
    assert {name for name, group in gated.items() if group == "other"} == {
        name for name in gated if name.endswith(("/bias", "/scale"))
    }
    decayed = flat(weight_decay_mask(shapes("conformal_sympow")))
    assert all(decayed[name] == (group != "other") for name, group in conformal.items())


def shapes(variant: str, *flags: str):
    return jax.eval_shape(Model(tiny_config(variant, *flags), VOCAB).init, jax.random.key(0))


def one_update(name: str, params, grads, **changes):
    config = dataclasses.replace(
        tiny_config("sympow").optimizer, name=name, warmup_steps=0, schedule="constant", clip_norm=0.0, **changes
    )
    optimizer = make_optimizer(config, 100)
    with jax.numpy_rank_promotion("allow"):  # optax mixes them
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params, step=1)[0]


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


def test_two_steps_of_adamw_by_hand(rng):
    """Gradients clipped together to norm 1, two moments with bias corrections, decay of the matrix alone."""
    flags = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.2, "clip_norm": 1.0}
    config = tiny_config("sympow", *(f"optimizer.{name}={value}" for name, value in flags.items()))
    optimizer = make_optimizer(
        dataclasses.replace(config.optimizer, name="adamw", schedule="constant", warmup_steps=0), 10
    )
    params = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    start = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    first, second = jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    state = optimizer.init(start)
    for number in (1, 2):
        gradients = {name: rng.normal(size=p.shape) for name, p in params.items()}
        updates, state = optimizer.update(
            {name: jnp.asarray(g, jnp.float32) for name, g in gradients.items()}, state, start, step=number
        )
        start = optax.apply_updates(start, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert norm > 1
        for name, p in params.items():
            g = gradients[name] / norm
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            direction = first[name] / (1 - 0.8**number) / (np.sqrt(second[name] / (1 - 0.9**number)) + 1e-3)
            params[name] = p - 0.1 * (direction + (0.2 * p if name == "kernel" else 0.0))
            np.testing.assert_allclose(start[name], params[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_is_rounded_between_steps_alone(rng, name):
    """Each update is that of the float32 optimizer from the rounded moment; all else of the state is float32."""
    params = {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    options = {"name": name, "schedule": "constant", "warmup_steps": 0, "freeze": ("none",)}
    config = dataclasses.replace(tiny_config("sympow").optimizer, **options)
    wide = make_optimizer(config, 10)
    narrow = make_optimizer(dataclasses.replace(config, state_dtype="bfloat16"), 10)
    start, state = wide.init(params), narrow.init(params)
    for number in jnp.arange(1, 4):
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        widened = jax.tree.map(lambda kept, like: kept.astype(like.dtype), state, start)
        want, after = wide.update(gradients, widened, params, step=number)
        got, state = narrow.update(gradients, state, params, step=number)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        rounded = jax.tree.map(lambda x, kept: x.astype(kept.dtype), after, state)
        jax.tree.map(np.testing.assert_array_equal, state, rounded)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    dtypes = {(moment, str(x.dtype)) for path, x in leaves for moment in ("mu", "nu") if f".{moment}" in map(str, path)}
    assert dtypes == {("mu", "bfloat16"), ("nu", "float32")}


def test_a_first_moment_that_bfloat16_cannot_move_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.b1 = 0\.999: .*; use at most 0\.99, or"):
        tiny_config("sympow", "optimizer.state_dtype=bfloat16", "optimizer.b1=0.999")


class OneLayer(Model):
    """Stands for a model: logits are a table looked up by token, so that losses can be written down."""

    def losses(self, params, inputs, targets, *, segment_ids=None, positions=None):
        logits = params["table"][inputs]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z


def sgd_step(params, batch, **options):
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    zero = jnp.int32(0)
    state = TrainState(zero, jax.tree.map(jnp.copy, params), optimizer.init(params), zero + 0, zero + 0, jnp.float32(0))
    flags = (f"optimizer.{name}={value}" for name, value in options.items())
    model = OneLayer(tiny_config("sympow", "data.batch_size=4", *flags), VOCAB)
    with mock.patch.object(step, "make_optimizer", lambda *_: optimizer):
        return step.make_train_step(model)(state, batch)


def test_z_loss_and_accumulation_by_hand(rng):
    params = {"table": jnp.asarray(rng.normal(size=(7, 7)), jnp.float32)}
    batch = {
        "inputs": rng.integers(0, 7, (4, 6)).astype(np.int32),
        "targets": rng.integers(0, 7, (4, 6)).astype(np.int32),
        "loss_mask": (rng.random((4, 6)) < 0.7).astype(np.float32),
    }

    def objective(table, weight):
        nll, log_z = OneLayer(tiny_config("sympow"), VOCAB).losses({"table": table}, batch["inputs"], batch["targets"])
        return jnp.sum((nll + weight * log_z**2) * batch["loss_mask"]) / batch["loss_mask"].sum()

    for weight, numbers in ((0.0, (4,)), (0.3, (1, 2, 4))):
        want = params["table"] - jax.jit(jax.grad(objective))(params["table"], weight)
        for steps in numbers:
            state, metrics = sgd_step(params, batch, accumulation_steps=steps, z_loss=weight)
            np.testing.assert_allclose(state.params["table"], want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(metrics["loss"], objective(params["table"], 0.0), rtol=1e-6)
