"""Next-token loss in float32, over blocks of tokens so that the logits of a long sequence never exist at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.typing import AnyArray, Array, Bool, Float, Int, PyTree

SOFTMAX = "softmax"  # its maxima and sums, kept for the backward pass, which computes the logits alone again


def token_logits(
    hidden: Float[Array, "*B E"], kernel: Float[Array, "E V"], *, scale: float = 1.0, softcap: float = 0.0
) -> Float[Array, "*B V"]:
    """l = scale hidden kernel in float32, or softcap tanh(l / softcap) (Gemma 2, arXiv 2408.00118) unless it is 0."""
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if scale == 1 else scale * logits
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def token_nll(
    hidden: Float[Array, "B T E"],
    kernel: Float[Array, "E V"],
    targets: Int[AnyArray, "B T"],
    *,
    block: int,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """nll_t = log Z_t - l_t,target and log Z_t = log sum_v exp(l_tv), with l of `token_logits`, in nats.

    On a mesh the tokens are spread over all of its axes that divide them, and every device holds the whole projection.

    Args:
      hidden: final hidden states, in the compute dtype.
      kernel: output projection.
      targets: the tokens to predict.
      block: how many tokens have logits at once on a device; the backward pass computes them again.
      scale, softcap: of the logits.
    """
    return _by_blocks(_nll_and_log_z, hidden, kernel, targets, block, scale=scale, softcap=softcap)


def token_scores(
    hidden: Float[Array, "B T E"],
    kernel: Float[Array, "E V"],
    targets: Int[AnyArray, "B T"],
    *,
    block: int,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """nll_t of `token_nll`, and whether the target is the most likely token (the first of equals)."""
    return _by_blocks(_nll_and_rank, hidden, kernel, targets, block, scale=scale, softcap=softcap)


def token_distance(
    name: str,
    hidden: tuple[Float[Array, "B T E"], Float[Array, "B T E"]],
    kernel: tuple[Float[Array, "E V"], Float[Array, "E V"]],
    *,
    block: int,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Float[Array, "B T"]:
    """How far q and p are apart, the softmax of the first and of the second logits.

    divergence is KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, variation 1/2 sum_v |p_v - q_v|, from 0 to 1.
    """
    unused = jnp.zeros(hidden[0].shape[:2], jnp.int32)
    return _by_blocks(_DISTANCES[name], hidden, kernel, unused, block, scale=scale, softcap=softcap)


def _total_variation(logits: tuple[Array, Array], targets: AnyArray) -> Array:
    del targets
    p, q = (jax.nn.softmax(each, axis=1) for each in logits)
    return jnp.sum(jnp.abs(p - q), axis=1) / 2


def _kullback_leibler(logits: tuple[Array, Array], targets: AnyArray) -> Array:
    del targets
    log_q, log_p = (jax.nn.log_softmax(each, axis=1) for each in logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


_DISTANCES = {"divergence": _kullback_leibler, "variation": _total_variation}


@jax.custom_vjp
def _nll_and_log_z(logits: Array, targets: AnyArray) -> tuple[Array, Array]:
    return _nll_forward(logits, targets)[0]


def _nll_forward(logits: Array, targets: AnyArray) -> tuple[tuple[Array, Array], PyTree]:
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    largest = jnp.max(logits, axis=1)
    total = jnp.sum(jnp.exp(logits - largest[:, None]), axis=1)
    largest, total = checkpoint_name((largest, total), SOFTMAX)
    log_z = jnp.log(total) + largest
    return (log_z - picked, log_z), (logits, targets, largest, total)


def _nll_backward(residuals: PyTree, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    """dl_tv = softmax(l)_tv (dnll_t + dlog Z_t) - [v is the target] dnll_t, in one pass over the logits."""
    logits, targets, largest, total = residuals
    dnll, dlog_z = cotangents
    softmax = jnp.exp(logits - largest[:, None]) * ((dnll + dlog_z) / total)[:, None]
    is_target = jnp.arange(logits.shape[1])[None] == targets[:, None]
    return softmax - jnp.where(is_target, dnll[:, None], 0.0), None


_nll_and_log_z.defvjp(_nll_forward, _nll_backward)


def _nll_and_rank(logits: Array, targets: AnyArray) -> tuple[Array, Array]:
    return _nll_and_log_z(logits, targets)[0], jnp.argmax(logits, axis=1) == targets


def _by_blocks(
    of_block: Callable[[Any, AnyArray], Any],
    hidden: PyTree,
    kernel: PyTree,
    targets: AnyArray,
    block: int,
    **logit_options: float,
) -> Any:
    """`of_block(logits, targets)` of all tokens [B, T], each device on its own, `block` at a time.

    `hidden` and `kernel` are those of one model, or trees of several models', as are the logits then.
    """
    kernel = jax.tree.map(lambda w, h: w.astype(h.dtype), kernel, hidden)
    logits_of = functools.partial(jax.tree.map, functools.partial(token_logits, **logit_options))
    local = functools.partial(_local_blocks, of_block=of_block, block=block, logits_of=logits_of)
    if not sharding.is_sharded():
        return local(hidden, kernel, targets)
    B, T = targets.shape
    time = sharding.dividing(T, ("seq", "tensor")) or sharding.dividing(T, "seq")
    tokens = P(sharding.dividing(B, sharding.BATCH), time)
    return sharding.over_shards(local, (hidden, kernel, targets), (tokens, P(), tokens), tokens)


def _local_blocks(
    hidden: PyTree,
    kernel: PyTree,
    targets: AnyArray,
    *,
    of_block: Callable[[Any, AnyArray], Any],
    block: int,
    logits_of: Callable[[PyTree, PyTree], PyTree],
) -> Any:
    B, T = targets.shape
    flat = jax.tree.map(lambda h: h.reshape(B * T, h.shape[-1]), hidden)
    target = targets.reshape(B * T)
    if block >= B * T:
        return jax.tree.map(lambda x: x.reshape(B, T), of_block(logits_of(flat, kernel), target))
    blocks = -(-B * T // block)
    padding = blocks * block - B * T
    flat = jax.tree.map(lambda h: jnp.pad(h, ((0, padding), (0, 0))).reshape(blocks, block, h.shape[-1]), flat)
    target = jnp.pad(target, (0, padding)).reshape(blocks, block)
    keep = jax.checkpoint_policies.save_only_these_names(SOFTMAX)
    body = jax.checkpoint(lambda _, xs: (None, of_block(logits_of(xs[0], kernel), xs[1])), policy=keep)
    _, found = jax.lax.scan(body, None, (flat, target))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), found)
