"""Next-token loss in float32, over blocks of tokens so that the logits of a long sequence never exist at once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.typing import AnyArray, Array, Float, Int


def token_nll(
    hidden: Float[Array, "B T E"], kernel: Float[Array, "E V"], targets: Int[AnyArray, "B T"], *, block: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """nll_t = log Z_t - l_t,target and log Z_t = log sum_v exp(l_tv), with l = hidden kernel, in nats.

    On a mesh the tokens are spread over all of its axes that divide them, and every device holds the whole projection.

    Args:
      hidden: final hidden states, in the compute dtype.
      kernel: output projection.
      targets: the tokens to predict.
      block: how many tokens have logits at once on a device; the backward pass computes them again.
    """
    kernel = kernel.astype(hidden.dtype)
    if not sharding.is_sharded():
        return _local_nll(hidden, kernel, targets, block)
    B, T = targets.shape
    time = sharding.dividing(T, ("seq", "tensor")) or sharding.dividing(T, "seq")
    tokens = P(sharding.dividing(B, sharding.BATCH), time)
    local = functools.partial(_local_nll, block=block)
    return sharding.over_shards(local, (hidden, kernel, targets), (tokens, P(), tokens), tokens)


def _local_nll(hidden: Array, kernel: Array, targets: AnyArray, block: int) -> tuple[Array, Array]:
    B, T, E = hidden.shape

    def block_nll(hidden_block, target_block):
        logits = jnp.matmul(hidden_block, kernel, preferred_element_type=jnp.float32)
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
