"""Which parameters the patterns of a config name: optimizer.freeze and optimizer.learning_rates.

A parameter is named as in init_from.json, with a star for the number of its layer, "layers/*/mixer/gate/kernel" or
"embedding/embedding": the layers of a run are one array, which is frozen, or has a rate, as a whole. Patterns are those
of fnmatch, whose star also stands for slashes.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sympow_jax.config import ConfigError, OptimizerConfig, nearest
from sympow_jax.typing import PyTree


def freezes(config: OptimizerConfig) -> bool:
    """Whether optimizer.freeze names anything."""
    return bool(_given(config.freeze))


def trained(config: OptimizerConfig, params: PyTree) -> PyTree:
    """False for each parameter that optimizer.freeze names."""
    return _map(lambda name: not any(fnmatch.fnmatchcase(name, pattern) for pattern in _given(config.freeze)), params)


def stop_frozen(config: OptimizerConfig, params: PyTree) -> PyTree:
    """The parameters, those that stay as they are without a gradient."""
    if not freezes(config):
        return params
    return jax.tree.map(lambda p, moves: p if moves else jax.lax.stop_gradient(p), params, trained(config, params))


def rate_factors(config: OptimizerConfig, params: PyTree) -> PyTree:
    """The learning rate of each parameter over optimizer.learning_rate: of the first pattern that fits, or 1."""
    rates = [_split(item) for item in _given(config.learning_rates)]

    def factor(name: str) -> float:
        fitting = (rate for pattern, rate in rates if fnmatch.fnmatchcase(name, pattern))
        return next(fitting, config.learning_rate) / config.learning_rate

    return _map(factor, params)


def check_patterns(config: OptimizerConfig, params: PyTree) -> None:
    """Raises ConfigError for a pattern that names no parameter, and where nothing is left to be trained."""
    names = jax.tree.leaves(_map(lambda name: name, params))
    rates = [_split(item)[0] for item in _given(config.learning_rates)]
    for key, patterns in (("freeze", _given(config.freeze)), ("learning_rates", rates)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"optimizer.{key}: no parameter is named {pattern!r}{nearest(pattern, names)}")
    if not any(jax.tree.leaves(trained(config, params))):
        raise ConfigError(f"optimizer.freeze = {','.join(config.freeze)}: leaves no parameter to train; freeze less")


def _given(patterns: Sequence[str]) -> Sequence[str]:
    return () if tuple(patterns) == ("none",) else patterns


def _split(item: str) -> tuple[str, float]:
    pattern, _, rate = item.rpartition("=")
    return pattern, float(rate)


def _map(of_name: Callable[[str], Any], params: PyTree) -> PyTree:
    def name(path) -> str:
        first, *rest = (str(key.key) for key in path)
        return "/".join(["layers/*" if first.startswith("blocks_") else first, *rest])

    return jax.tree_util.tree_map_with_path(lambda path, _: of_name(name(path)), params)
