"""All that a training run carries from step to step, besides the step's place in the data."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import ConfigError
from sympow_jax.layers.state_specs import named_arrays, state_specs
from sympow_jax.models.model import Model
from sympow_jax.training.optimizer import make_optimizer
from sympow_jax.training.passed_state import empty_stream
from sympow_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and counters.

    Scalars and leaves are arrays, or what stands for them: a ShapeDtypeStruct, a sharding.

    Attributes:
      step: steps taken, applied or not, int32; also the number of batches consumed. The learning rate follows it.
      params: nested dict, float32.
      opt_state: optax's; its counts are of steps applied.
      skipped: steps not applied because something was not finite or the gradient an outlier, int32.
      skipped_in_a_row: of those, the ones since the last good step, int32.
      grad_norm_mean: running mean of the gradient norms of the steps applied, float32.
      stream: the state that the last batch left behind, where training.initial_state is not zero, else None.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    skipped: PyTree
    skipped_in_a_row: PyTree
    grad_norm_mean: PyTree
    stream: PyTree = None


def create_train_state(model: Model, seed: int) -> TrainState:
    """Step 0 of a run, each array created where it lives on the model's mesh."""
    create = _creator(model, seed)
    if model.mesh is None:
        return jax.jit(create)()
    return jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), model.mesh))()


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where every array of a train state, or of its shapes, lives."""
    where = sharding.tree_shardings(dataclasses.replace(state, stream=None), mesh)
    with sharding.use_mesh(mesh):
        return dataclasses.replace(where, stream=sharding.named_shardings(state_specs(state.stream), mesh))


def abstract_train_state(model: Model) -> TrainState:
    """Shapes, dtypes and, on the model's mesh, shardings of a train state."""
    state = jax.eval_shape(_creator(model, 0))
    return state if model.mesh is None else sharding.with_shardings(state, state_shardings(state, model.mesh))


def abstract_params(model: Model) -> PyTree:
    """The same of its parameters alone."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return (
        params if model.mesh is None else sharding.with_shardings(params, sharding.tree_shardings(params, model.mesh))
    )


def check_host_memory(model: Model) -> None:
    """Raises ConfigError when the train state is larger than this machine's memory, where it is to be kept there.

    Accelerators refuse what they cannot hold; on a CPU the run would wait for ever, or be killed.
    """
    if jax.default_backend() != "cpu":
        return
    state = jax.eval_shape(_creator(model, 0))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / jax.process_count()
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ConfigError(
            f"out of memory: parameters and optimizer state take {needed / 2**30:,.1f} GiB, and this machine has "
            f"{there / 2**30:,.1f} GiB; lower model.num_layers, model.embed_dim or model.mlp_dim, or spread the run "
            "over more machines"
        )


def _creator(model: Model, seed: int) -> Callable[[], TrainState]:
    optimizer = make_optimizer(model.config.optimizer, model.config.num_train_steps)

    def create() -> TrainState:
        params = model.init(jax.random.key(seed))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), zero, zero, jnp.float32(0), empty_stream(model))

    return create


def to_tree(state: TrainState) -> dict[str, Any]:
    """A plain nested dict with stable names, as checkpoints store it."""
    tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    stream = named_arrays(tree.pop("stream"), ".")
    tree |= {"stream": stream} if stream else {}
    return tree | {"opt_state": serialization.to_state_dict(state.opt_state)}


def from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_tree`; `like` gives optax's structure and that of the stream."""
    opt_state = serialization.from_state_dict(like.opt_state, tree["opt_state"])
    arrays = [tree["stream"][name] for name in named_arrays(like.stream, ".")]
    stream = jax.tree.unflatten(jax.tree.structure(like.stream), arrays)
    return dataclasses.replace(like, **{**tree, "opt_state": opt_state, "stream": stream})
