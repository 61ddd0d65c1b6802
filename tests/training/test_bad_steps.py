"""Steps that are not applied: what the compiled step does with them, and what is said about them."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sympow_jax.training.bad_steps import BadSteps, BadStepsError
from sympow_jax.training.metrics import METRICS_NAME, MetricsWriter, read_metrics
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import TrainState

PARAMS = {"a": {"kernel": jnp.zeros(())}, "b": {"kernel": jnp.zeros(())}}


class Linear:
    """Stands for a model: the gradients with respect to a and b are the mean inputs and the mean targets."""

    mesh = None

    def losses(self, params, inputs, targets, *, segment_ids=None, positions=None):
        nll = params["a"]["kernel"] * inputs + params["b"]["kernel"] * targets
        return nll, jnp.zeros_like(nll)


def run(gradients, **options):
    """One step for each pair of gradients of a and b; the state and the metrics of each."""
    optimizer = optax.sgd(1e-3)
    zero = jnp.int32(0)
    state = TrainState(zero, jax.tree.map(jnp.copy, PARAMS), optimizer.init(PARAMS), zero + 0, zero + 0, jnp.float32(0))
    step, history = make_train_step(Linear(), optimizer, optax.constant_schedule(1e-3), **options), []
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


@pytest.mark.parametrize(("ratio", "skipped"), [(0.0, 0), (3.0, 1), (5.0, 0)])
def test_an_outlier_beyond_the_ratio_is_not_applied(ratio, skipped):
    history = run([(1.0, 0.0)] * 25 + [(4.0, 0.0), (1.0, 0.0)], outlier_ratio=ratio)
    assert int(history[-1][0].skipped) == skipped and int(history[-1][0].skipped_in_a_row) == 0
    applied = 26 + 4 * (1 - skipped)
    assert float(history[-1][0].params["a"]["kernel"]) == pytest.approx(-1e-3 * applied)
    assert float(history[24][0].grad_norm_mean) == pytest.approx(1.0)


def test_the_first_steps_are_never_outliers():
    history = run([(1.0, 0.0)] * 5 + [(1e3, 0.0)], outlier_ratio=2.0)
    assert int(history[-1][0].skipped) == 0


class Data:
    """Stands for the run's data."""

    train: "Data"

    def __init__(self):
        self.train = self

    def describe(self, step):
        return [{"store": "s", "row": 10 * step, "columns": [0, 3], "documents": [step], "text": "t"}]


def test_bad_steps_are_written_one_step_late_and_stop_the_run_past_the_bound(tmp_path):
    stream = io.StringIO()
    history = run([(1.0, 1.0), (1.0, np.nan), (1.0, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, 1.0)])
    with MetricsWriter(tmp_path, resume_step=None, total_steps=9, tensorboard=False, stream=stream) as writer:
        bad = BadSteps(PARAMS, Data(), writer, max_in_a_row=1)
        for step in range(1, 6):
            bad.see(step, history[step - 1][1])
        with pytest.raises(BadStepsError, match=r"max_skipped_steps = 1: 2 steps in a row up to step 5 .*--batch=4"):
            bad.see(6, history[5][1])
    rows = read_metrics(tmp_path / METRICS_NAME)
    assert [(row["step"], row["tensor"], row["documents"], row["rows"]) for row in rows] == [
        (2, "gradients/b/kernel", [1], [["s", 10, 0, 3]]),
        (4, "gradients/a/kernel", [3], [["s", 30, 0, 3]]),
        (5, "gradients/b/kernel", [4], [["s", 40, 0, 3]]),
    ]
    assert "step 2 was not applied: gradients/b/kernel is not finite, and neither is the loss" in stream.getvalue()
