"""Next-token loss in float32, over blocks of tokens so that the logits of a long sequence never exist at once."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.typing import AnyArray, Array, Float, Int


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
    kernel = kernel.astype(hidden.dtype)
    logits_of = functools.partial(token_logits, scale=scale, softcap=softcap)
    local = functools.partial(_local_nll, block=block, logits_of=logits_of)
    if not sharding.is_sharded():
        return local(hidden, kernel, targets)
    B, T = targets.shape
    time = sharding.dividing(T, ("seq", "tensor")) or sharding.dividing(T, "seq")
    tokens = P(sharding.dividing(B, sharding.BATCH), time)
    return sharding.over_shards(local, (hidden, kernel, targets), (tokens, P(), tokens), tokens)


def _local_nll(
    hidden: Array, kernel: Array, targets: AnyArray, *, block: int, logits_of: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    B, T, E = hidden.shape

    def block_nll(hidden_block, target_block):
        logits = logits_of(hidden_block, kernel)
        picked = jnp.take_along_axis(logits, target_block[:, None], axis=1)[:, 0]
        log_z = jax.nn.logsumexp(logits, axis=1)
        return log_z - picked, log_z

    flat, target = hidden.reshape(B * T, E), targets.reshape(B * T)
    if block >= B * T:
        return jax.tree.map(lambda x: x.reshape(B, T), block_nll(flat, target))
    blocks = -(-B * T // block)
    padding = blocks * block - B * T
    flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(blocks, block, E)
    target = jnp.pad(target, (0, padding)).reshape(blocks, block)
    body = jax.checkpoint(lambda _, xs: (None, block_nll(*xs)))
    _, losses = jax.lax.scan(body, None, (flat, target))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), losses)
