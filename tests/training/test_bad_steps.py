"""Steps that are not applied: what the compiled step does with them, and what is said about them."""

import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sympow_jax.input_pipeline.batches import BatchSource
from sympow_jax.models.model import Model
from sympow_jax.training import step as step_module
from sympow_jax.training.bad_steps import BadSteps, BadStepsError
from sympow_jax.training.clock import Clock
from sympow_jax.training.metrics import METRICS_NAME, MetricsWriter, read_metrics
from sympow_jax.training.step_reports import StepReports
from sympow_jax.training.train_state import TrainState
from tests.models.small import tiny_config


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {"a": {"kernel": jnp.zeros(())}, "b": {"kernel": jnp.zeros(())}}


class Linear(Model):
    """Stands for a model: the gradients with respect to a and b are the mean inputs and the mean targets."""

    def losses(self, params, inputs, targets, *, segment_ids=None, positions=None):
        nll = params["a"]["kernel"] * inputs + params["b"]["kernel"] * targets
        return nll, jnp.zeros_like(nll)


def run(gradients, *flags, optimizer=None):
    """One step for each pair of gradients of a and b; the state and the metrics of each. SGD by default."""
    optimizer = optax.with_extra_args_support(optimizer or optax.sgd(1e-3))
    model = Linear(tiny_config("sympow", *(f"optimizer.{flag}" for flag in flags)), vocab_size=1)
    with mock.patch.object(step_module, "make_optimizer", lambda *_: optimizer):
        step, history = step_module.make_train_step(model), []
    zero = jnp.int32(0)
    state = TrainState(zero, jax.tree.map(jnp.copy, PARAMS), optimizer.init(PARAMS), zero + 0, zero + 0, jnp.float32(0))
    for a, b in gradients:
        batch = {"inputs": np.full((2, 3), a, np.float32), "targets": np.full((2, 3), b, np.float32)}
        state, metrics = step(state, batch)
        history.append((jax.device_get(state), metrics))
    return history


def test_a_step_that_is_not_finite_changes_counters_only_and_names_the_first_bad_leaf():
    (before, fine), (after, bad), (_, again) = run([(1.0, 2.0), (1.0, np.inf), (np.nan, np.nan)])
    assert (int(fine["bad_gradient"]), int(bad["bad_gradient"]), int(again["bad_gradient"])) == (-1, 1, 0)
    assert jax.tree.map(float, after.params) == jax.tree.map(float, before.params)
    assert float(after.grad_norm_mean) == float(before.grad_norm_mean) == pytest.approx(5**0.5)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)


def test_an_update_that_is_not_finite_is_not_applied_though_loss_and_gradient_are():
    """Adam with b2 = 1 divides by a bias correction of 0: legal gradients, parameters that would be NaN."""
    (before, fine), (after, bad) = run([(0.0, 0.0), (1.0, 2.0)], optimizer=optax.scale_by_adam(b2=1.0, eps=0.0))
    for state, metrics in ((before, fine), (after, bad)):
        assert int(metrics["bad_gradient"]) == -1 and int(metrics["bad_parameter"]) == 0
        assert jax.tree.map(float, state.params) == {"a": {"kernel": 0.0}, "b": {"kernel": 0.0}}
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.opt_state.count)) == (2, 2, 0)


@pytest.mark.parametrize(("ratio", "skipped"), [(0.0, 0), (3.0, 1), (5.0, 0)])
def test_an_outlier_beyond_the_ratio_is_not_applied(ratio, skipped):
    history = run([(1.0, 0.0)] * 25 + [(4.0, 0.0), (1.0, 0.0)], f"outlier_ratio={ratio}")
    assert int(history[-1][0].skipped) == skipped and int(history[-1][0].skipped_in_a_row) == 0
    applied = 26 + 4 * (1 - skipped)
    assert float(history[-1][0].params["a"]["kernel"]) == pytest.approx(-1e-3 * applied)
    assert float(history[24][0].grad_norm_mean) == pytest.approx(1.0)


def test_the_first_steps_are_never_outliers():
    history = run([(1.0, 0.0)] * 5 + [(1e3, 0.0)], "outlier_ratio=2.0")
    assert int(history[-1][0].skipped) == 0


@pytest.mark.parametrize(("applied", "skipped"), [(19, 0), (20, 1)])
def test_twenty_applied_steps_come_before_the_first_outlier(applied, skipped):
    """Steps that were not applied count for nothing."""
    history = run([(np.nan, 0.0)] * 3 + [(1.0, 0.0)] * applied + [(1e3, 0.0)], "outlier_ratio=2.0")
    assert int(history[-1][0].skipped) == 3 + skipped


def test_the_running_mean_is_over_the_steps_applied():
    """All of them, (1 + 2 + 6) / 3, up to the hundredth; from then on it moves by a hundredth of the distance."""
    first = run([(1.0, 0.0), (np.nan, 0.0), (2.0, 0.0), (6.0, 0.0)])
    assert float(first[-1][0].grad_norm_mean) == pytest.approx(3.0)
    later = run([(1.0, 0.0)] * 110 + [(3.0, 0.0)])
    assert float(later[-1][0].grad_norm_mean) == pytest.approx(1.02)


class Source(BatchSource):
    """Stands for the run's batches."""

    def describe(self, step, *, text=True):
        assert not text  # its tokenizer may need a package that training does without
        return [{"store": "s", "row": 10 * step, "columns": [0, 3], "documents": [step]}]


class Seconds(Clock):
    """Stands for the clock: a second a step."""

    def row(self, step):
        return {"seconds": float(step)}


def test_steps_are_reported_one_step_late_and_bad_ones_stop_the_run_past_the_bound(tmp_path):
    stream = io.StringIO()
    history = run([(1.0, 1.0), (1.0, np.nan), (1.0, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, 1.0)])
    with MetricsWriter(tmp_path, resume_step=None, total_steps=9, tensorboard=False, stream=stream) as writer:
        bad = BadSteps(PARAMS, Source(), writer, max_in_a_row=1)
        config = tiny_config("sympow", "logging.every_steps=3", "data.batch_size=2", "data.seq_len=16")
        reports = StepReports(config, bad, writer, Seconds())
        for step in range(1, 6):
            reports.see(step, history[step - 1][1])
            assert all(row["step"] < step for row in read_metrics(tmp_path / METRICS_NAME))
        with pytest.raises(BadStepsError, match=r"max_skipped_steps = 1: 2 steps in a row up to step 5 .*--batch=4"):
            reports.see(6, history[5][1])
    rows = read_metrics(tmp_path / METRICS_NAME)
    logged = [row for row in rows if "loss" in row]
    names = {"step", "loss", "grad_norm", "param_norm", "learning_rate", "skipped", "skipped_in_a_row"}
    assert [(row["step"], row["skipped"], row["seconds"], row["tokens"]) for row in logged] == [(3, 1, 3.0, 96)]
    assert logged[0].keys() == names | {"seconds", "tokens"}
    rows = [row for row in rows if "loss" not in row]
    assert [(row["step"], row["tensor"], row["documents"], row["rows"]) for row in rows] == [
        (2, "gradients/b/kernel", [1], [["s", 10, 0, 3]]),
        (4, "gradients/a/kernel", [3], [["s", 30, 0, 3]]),
        (5, "gradients/b/kernel", [4], [["s", 40, 0, 3]]),
    ]
    assert "step 2 was not applied: gradients/b/kernel is not finite, and neither is the loss" in stream.getvalue()
