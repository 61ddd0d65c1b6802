"""What a training step minimises, summed over a batch: the loss of the targets, z-loss, and distillation.

Distillation has the outputs of a frozen original as targets, after PowerCoder (Manifest AI, 2025) and LoLCATs (Zhang
et al. 2024, arXiv 2410.10254): with x_l of the layers' outputs and p of the next token's distribution, o the original,

    nll + z_loss log^2 Z + distill_layers mean_l |x_l - x_l^o|^2 / |x_l^o|^2 + distill_logits KL(p^o || p),

a mean over targets. While attention.blend_steps last, the model is the blend.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.models.model import Features, Model
from sympow_jax.typing import Array, Float, PyTree

_LEAST = 1e-30  # a stream of zeros has no direction to be off


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen original: its model, and its parameters, an argument of the compiled step and in no checkpoint."""

    model: Model
    params: PyTree


def training_sums(
    model: Model,
    params: PyTree,
    batch: PyTree,
    *,
    softmax_share: Float[Array, ""] | None = None,
    teacher: Model | None = None,
    teacher_params: PyTree = None,
    state: PyTree = None,
) -> tuple[Array, dict[str, Array]]:
    """(what is minimised, its parts by name, `count` among them): sums over the batch's targets, float32 scalars.

    With `state`, of the tokens before the batch, one of the parts is `stream`, the state after it.
    """
    o, targets = model.config.optimizer, batch["targets"]
    known: dict[str, Any] = {"segment_ids": batch.get("segment_ids"), "positions": batch.get("positions")}
    mine: dict[str, Any] = known if softmax_share is None else known | {"softmax_share": softmax_share}
    distances, left = {}, {}
    if teacher is None and state is None:
        nll, log_z = model.losses(params, batch["inputs"], targets, **mine)
    else:
        features = model.features(params, batch["inputs"], **mine, with_layers=o.distill_layers > 0, state=state)
        nll, log_z = model.token_losses(features, targets)
        if state is not None:
            left["stream"] = jax.lax.stop_gradient(features.state)
        if teacher is not None:
            original = teacher.features(teacher_params, batch["inputs"], **known, with_layers=o.distill_layers > 0)
            distances = _distances(model, features, jax.lax.stop_gradient(original))
    mask = batch["loss_mask"].astype(jnp.float32) if "loss_mask" in batch else jnp.ones_like(nll)
    sums = {"loss": jnp.sum(nll * mask), "count": jnp.sum(mask)}
    sums |= {name: jnp.sum(distance * mask) for name, distance in distances.items()}
    total = sums["loss"] + sum(getattr(o, name) * sums[name] for name in distances)
    return total + o.z_loss * jnp.sum(log_z**2 * mask) if o.z_loss else total, sums | left


def _distances(model: Model, features: Features, original: Features) -> dict[str, Float[Array, "B T"]]:
    """What each token is off, by the key of OptimizerConfig that is its weight."""
    o, found = model.config.optimizer, {}
    if o.distill_layers:
        found["distill_layers"] = layer_distances(features, original)
    if o.distill_logits:
        found["distill_logits"] = model.divergence(features, original)
    return found


def layer_distances(features: Features, original: Features) -> Float[Array, "B T"]:
    """mean_l |x_l - x_l^o|^2 / |x_l^o|^2 at each token, over the layers l, in float32."""
    mine, others = (jnp.concatenate([run.astype(jnp.float32) for run in each.layers]) for each in (features, original))
    error, norm = jnp.sum((mine - others) ** 2, axis=-1), jnp.sum(others**2, axis=-1)
    return jnp.mean(error / jnp.maximum(norm, _LEAST), axis=0)
