"""Optimizers and learning-rate schedules, from optax."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sympow_jax.config import OptimizerConfig
from sympow_jax.training.patterns import freezes, rate_factors, trained
from sympow_jax.typing import PyTree

_TABLES = ("embedding", "output")
_NARROW = tuple(("mixer", name) for name in ("gate", "beta", "beta_down", "beta_up"))  # to gates and rotary steps
_MUON_RMS = 0.2  # updates as large as AdamW's, so that its learning rate and weight decay fit Muon too


def learning_rate_schedule(config: OptimizerConfig, num_train_steps: int) -> optax.Schedule:
    """The learning rate of step n = 1 .. N, N = num_train_steps, with W = warmup_steps and R = learning_rate:

        n <= W:  R n / W, so that the first step moves and step W has the whole rate
        n > W:   constant: R
                 linear, cosine: from R at W down to final_fraction R at N
                 wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): R, then linear over the last
                 D = decay_fraction N steps, from R at N - D down to final_fraction R at N

    The last step has exactly final_fraction R (where W < N). Steps count whether or not they were applied: a step that
    was left out had its rate, and the schedule ends with the run. A resumed run with another N follows the schedule
    of the new N from its next step on.
    """
    peak, steps = config.learning_rate, max(num_train_steps - config.warmup_steps, 1)
    decay_steps = min(max(round(config.decay_fraction * num_train_steps), 1), steps)

    def linear(steps: int) -> optax.Schedule:
        return optax.linear_schedule(peak, config.final_fraction * peak, steps)

    stable = optax.constant_schedule(peak)
    after = {
        "constant": stable,
        "cosine": optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction),
        "linear": linear(steps),
        "wsd": optax.join_schedules([stable, linear(decay_steps)], [steps - decay_steps]),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def parameter_groups(params: PyTree) -> PyTree:
    """The group of each parameter, by its path: "matrix", "table" or "other".

    matrix: projections of attention, convolution layers and MLP, a stack of matrices each. table: embeddings and the
    output projection. other: biases, norms, position biases, convolution taps, projections to gates and rotary steps.
    """

    def group(path, _) -> str:
        names = tuple(key.key for key in path)
        if names[-1] in _TABLES:
            return "table"
        narrow = any(names[-3:-1] == pair for pair in _NARROW) or names[-2:] == ("mixer", "kernel")
        return "matrix" if names[-1] == "kernel" and not narrow else "other"

    return jax.tree_util.tree_map_with_path(group, params)


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for matrices and tables."""
    return jax.tree.map(lambda group: group != "other", parameter_groups(params))


def make_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping (if clip_norm > 0), then AdamW, Adam without weight decay, or Muon.

    `update` takes the number of the step besides, `step` = 1 .. num_train_steps: it has the rate of that step, while
    Adam's bias corrections count the updates made, as the moments do. The parameters of optimizer.learning_rates have
    multiples of that rate; those of optimizer.freeze have no state, and stay as they are. With optimizer.state_dtype =
    bfloat16 the first moment is kept in it, rounded to nearest once an update is made of it in float32. The second
    moment stays float32: a step moves it by 1 - b2 of itself, which bfloat16 would round away at b2 = 0.999.
    """
    rate = _scale_by_rate(config, num_train_steps)
    adam = _keep_narrow(config, optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.name == "adam":
        update = optax.chain(adam, rate)
    else:
        update = optax.chain(adam, optax.add_decayed_weights(config.weight_decay, weight_decay_mask), rate)
    if config.name == "muon":
        groups: dict[Hashable, optax.GradientTransformation] = {
            "matrix": _muon(config, rate),
            "table": update,
            "other": update,
        }
        update = optax.partition(groups, parameter_groups)
    if freezes(config):
        update = optax.partition({True: update, False: optax.set_to_zero()}, lambda params: trained(config, params))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def _scale_by_rate(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate of `step`, and the factors of optimizer.learning_rates.

    The state is that of optax.scale_by_schedule, the last step applied, so that checkpoints keep their arrays; the
    step comes from the train state, which alone counts those not applied.
    """

    schedule = learning_rate_schedule(config, num_train_steps)

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **more: Any) -> tuple[PyTree, PyTree]:
        del state, params
        step = more["step"]
        rate = -jnp.asarray(schedule(step), jnp.float32)
        factors = rate_factors(config, updates)
        scale = lambda u, factor: (rate if factor == 1 else rate * factor).astype(u.dtype) * u  # noqa: E731
        return jax.tree.map(scale, updates, factors), optax.ScaleByScheduleState(step)

    return optax.GradientTransformationExtraArgs(init, update)


def _keep_narrow(config: OptimizerConfig, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same update with the first moment, `mu` of its state, in optimizer.state_dtype between steps."""
    if config.state_dtype == "float32":
        return inner

    def cast(state: Any, dtype: str) -> Any:
        return state._replace(mu=optax.tree.cast(state.mu, jnp.dtype(dtype)))

    def init(params: PyTree) -> PyTree:
        return cast(inner.init(params), config.state_dtype)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, config.state_dtype)

    return optax.GradientTransformation(init, update)


def _muon(config: OptimizerConfig, rate: optax.GradientTransformationExtraArgs) -> optax.GradientTransformation:
    """Momentum 0.95 orthogonalised by Newton-Schulz, matrix by matrix of a stack (Jordan 2024; Liu et al. 2025)."""

    def dims(updates: PyTree) -> PyTree:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    return optax.chain(
        _keep_narrow(config, optax.contrib.scale_by_muon(weight_dimension_numbers=dims)),
        _scale_by_shape(),
        optax.add_decayed_weights(config.weight_decay),
        rate,
    )


def _scale_by_shape() -> optax.GradientTransformation:
    """Times 0.2 sqrt(max(rows, columns)): the root mean square of AdamW's updates (arXiv 2502.16982)."""
    return optax.stateless_with_tree_map(lambda update, _: update * _MUON_RMS * max(jnp.shape(update)[-2:]) ** 0.5)
