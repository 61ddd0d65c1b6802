"""Next-token loss in float32, over blocks of tokens so that the logits of a long sequence never exist at once."""

import jax
import jax.numpy as jnp

from sympow_jax.typing import Array, Float, Int


def token_nll(
    hidden: Float[Array, "B T E"], kernel: Float[Array, "E V"], targets: Int[Array, "B T"], *, block: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """nll_t = log Z_t - l_t,target and log Z_t = log sum_v exp(l_tv), with l = hidden kernel, in nats.

    Args:
      hidden: final hidden states, in the compute dtype.
      kernel: output projection.
      targets: the tokens to predict.
      block: how many tokens have logits at once; the backward pass computes them again.
    """
    B, T, E = hidden.shape
    kernel = kernel.astype(hidden.dtype)

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
