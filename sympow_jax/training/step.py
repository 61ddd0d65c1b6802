"""One optimizer step, and one batch of held-out loss, as compiled functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sympow_jax.models.model import Model
from sympow_jax.training.objective import Teacher, training_sums
from sympow_jax.training.optimizer import learning_rate_schedule, make_optimizer
from sympow_jax.training.passed_state import state_after_skip, state_before
from sympow_jax.training.patterns import stop_frozen
from sympow_jax.training.train_state import TrainState, state_shardings
from sympow_jax.typing import Array, PyTree

_MEAN_OVER = 100
_OUTLIERS_AFTER = 20


TrainStep = Callable[..., tuple[TrainState, dict[str, Array]]]


def train_steps(model: Model, teacher: Teacher | None = None) -> Callable[[int], TrainStep]:
    """The step of each number 1, 2, ...: with the softmax branch in the first attention.blend_steps, then without.

    They are two programs, so that what is over costs nothing.
    """
    blend_steps = model.config.attention.blend_steps
    plain = make_train_step(model, teacher)
    blended = make_train_step(model, teacher, blends=True) if blend_steps else plain
    return lambda number: blended if number <= blend_steps else plain


def make_train_step(model: Model, teacher: Teacher | None = None, *, blends: bool = False) -> TrainStep:
    """(state, batch) -> (state, metrics): the gradient of the mean loss over the batch, and one update.

    The step is that of `model.config`: optimizer, schedule, accumulation_steps, z_loss and outlier_ratio. What is
    minimised is the mean of nll + z_loss log^2 Z (Chowdhery et al. 2022, arXiv 2204.02311) and what a teacher adds (see
    `objective`); the metric `loss` is the mean of nll alone, and `learning_rate` the rate that the step has, applied or
    not. `blends` is for the steps n <= N = attention.blend_steps: softmax has the share 1 - (n - 1) / N, the metric
    `softmax_share`.
    With accumulation the batch is cut into equal microbatches, of every n-th row, so that each device cuts its own;
    their gradients are added, and the mean is over the tokens of the whole batch. A step whose loss, gradient norm or
    new parameters are not finite changes nothing but the counters; nor does one whose gradient norm is beyond
    `outlier_ratio` (0: no bound) times its running mean over about the last _MEAN_OVER steps applied, once there were
    _OUTLIERS_AFTER of them. `bad_gradient` is the number of the first leaf of the gradients that is not finite, -1 for
    none, and `bad_parameter` that of the first leaf which the update would have made so.
    The state's buffers are donated.
    """
    o = model.config.optimizer
    outlier_ratio, gradients = o.outlier_ratio, _make_gradients(model, teacher and teacher.model)
    optimizer = make_optimizer(o, model.config.num_train_steps)
    schedule = learning_rate_schedule(o, model.config.num_train_steps)

    def train_step(
        state: TrainState, batch: PyTree, teacher_params: PyTree = None
    ) -> tuple[TrainState, dict[str, Array]]:
        share = 1 - state.step.astype(jnp.float32) / model.config.attention.blend_steps if blends else None
        before = state_before(model, state.stream, batch, state.step)
        means, grads = gradients(state.params, batch, share, teacher_params, before)
        stream = means.pop("stream", None)
        loss = means["loss"]
        grad_norm = optax.tree.norm(grads)
        applied, mean = state.step - state.skipped, state.grad_norm_mean
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if outlier_ratio:
            good &= (applied < _OUTLIERS_AFTER) | (grad_norm <= outlier_ratio * mean)
        bad_gradients = jnp.stack([~jnp.isfinite(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step + 1)
        params = optax.apply_updates(state.params, updates)
        bad_parameters = jnp.stack([~jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)])
        good &= ~jnp.any(bad_parameters)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
        skipped = 1 - good.astype(jnp.int32)
        metrics = means | ({} if share is None else {"softmax_share": share})
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": jnp.asarray(schedule(state.step + 1), jnp.float32),
            "skipped": state.skipped + skipped,
            "skipped_in_a_row": jnp.where(good, 0, state.skipped_in_a_row + 1),
            "bad_gradient": _first(bad_gradients),
            "bad_parameter": _first(bad_parameters),
        }
        state = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(opt_state, state.opt_state),
            metrics["skipped"],
            metrics["skipped_in_a_row"],
            keep(mean + (grad_norm - mean) / jnp.minimum(applied + 1, _MEAN_OVER).astype(jnp.float32), mean),
            keep(stream, state_after_skip(model, state.stream, before)),
        )
        if model.mesh is not None:
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, model.mesh))
        return state, metrics

    compiled = jax.jit(train_step, donate_argnums=0)
    return compiled if teacher is None else functools.partial(compiled, teacher_params=teacher.params)


def _make_gradients(model: Model, teacher: Model | None) -> Callable[..., tuple[dict[str, Array], PyTree]]:
    """(params, batch, share, teacher's params, state) -> means over the batch, the gradient of what is minimised."""
    accumulation_steps = model.config.optimizer.accumulation_steps

    def objective(params, batch, share, teacher_params, before):
        params = stop_frozen(model.config.optimizer, params)
        known: dict[str, Any] = {"softmax_share": share, "teacher": teacher, "teacher_params": teacher_params}
        known["state"] = before
        return training_sums(model, params, batch, **known)

    def gradients(params, batch, *known):
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        if accumulation_steps == 1:
            (_, sums), grads = value_and_grad(params, batch, *known)
        else:
            micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), batch)

            def accumulate(carry, microbatch):
                (_, sums), grads = value_and_grad(params, microbatch, *known)
                return jax.tree.map(jnp.add, carry, (sums, grads)), None

            first = jax.tree.map(lambda x: x[0], micro)
            (_, shapes), _ = jax.eval_shape(value_and_grad, params, first, *known)
            zeros = jax.tree.map(jnp.zeros_like, (shapes, params))
            (sums, grads), _ = jax.lax.scan(accumulate, zeros, micro)
        count, stream = jnp.maximum(sums.pop("count"), 1.0), sums.pop("stream", None)
        means, grads = jax.tree.map(lambda x: x / count, (sums, grads))
        return means | ({} if stream is None else {"stream": stream}), grads

    return gradients


def _first(flags: Array) -> Array:
    """The number of the first that is true, -1 for none."""
    return jnp.where(jnp.any(flags), jnp.argmax(flags).astype(jnp.int32), -1)


def make_eval_step(model: Model) -> Callable[[PyTree, PyTree], tuple[Array, Array]]:
    """(params, batch) -> summed loss and number of targets."""

    def eval_step(params: PyTree, batch: PyTree) -> tuple[Array, Array]:
        _, sums = training_sums(model, params, batch)
        return sums["loss"], sums["count"]

    return jax.jit(eval_step)


def make_accuracy_step(model: Model) -> Callable[[PyTree, PyTree], tuple[Array, Array]]:
    """(params, batch) -> right answers among the targets that loss_mask asks for, and their number."""

    def accuracy_step(params: PyTree, batch: PyTree) -> tuple[Array, Array]:
        logits, _ = model.logits(params, batch["inputs"])
        mask = batch["loss_mask"].astype(jnp.float32)
        right = (jnp.argmax(logits, axis=-1).astype(batch["targets"].dtype) == batch["targets"]).astype(jnp.float32)
        return jnp.sum(right * mask), jnp.sum(mask)

    return jax.jit(accuracy_step)
