"""Optimizers and learning-rate schedules, from optax."""

import jax
import optax

from sympow_jax.config import OptimizerConfig
from sympow_jax.typing import PyTree

_DECAYED = ("kernel", "embedding", "output")
_NEVER_DECAYED = (("mixer", "gate"), ("mixer", "beta"))


def learning_rate_schedule(config: OptimizerConfig, num_train_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine that ends at final_fraction * learning_rate."""
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        steps = max(num_train_steps - config.warmup_steps, 1)
        after = optax.cosine_decay_schedule(config.learning_rate, steps, alpha=config.final_fraction)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for matrices; False for biases, norms, and the projections to gates and rotary steps."""

    def decayed(path, _) -> bool:
        names = tuple(key.key for key in path)
        return names[-1] in _DECAYED and not any(names[-3:-1] == pair for pair in _NEVER_DECAYED)

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping (if clip_norm > 0), then AdamW, or Adam without weight decay."""
    schedule = learning_rate_schedule(config, num_train_steps)
    b1, b2, eps, decay = config.b1, config.b2, config.eps, config.weight_decay
    if config.name == "adam":
        update = optax.adam(schedule, b1, b2, eps)
    else:
        update = optax.adamw(schedule, b1, b2, eps, weight_decay=decay, mask=weight_decay_mask)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update
