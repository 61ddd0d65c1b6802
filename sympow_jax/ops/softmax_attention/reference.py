"""Dense softmax attention: the whole T x S matrix; the oracle when its inputs are float64."""

import jax
import jax.numpy as jnp

from sympow_jax.ops.softmax_attention.inputs import Inputs, visible
from sympow_jax.typing import accumulation_dtype


def reference(x: Inputs, *, scale: float, window: int | None) -> jax.Array:
    """softmax_j(scale q_i . k_j + bias(i, j) + G_i - G_j) v_j over the visible j; 0 for rows that see nothing.

    A sink is one more logit of the softmax, with a value of 0.
    """
    B, T, H, D = x.q.shape
    K = x.k.shape[2]
    dtype = accumulation_dtype(x.q, x.k, x.v)
    q = x.q.reshape(B, T, K, H // K, D)
    logits = jnp.einsum("btkgd,bskd->bkgts", q, x.k, preferred_element_type=dtype) * scale
    logits = logits.reshape(B, H, T, -1)
    if x.bias is not None:
        bias = x.bias(x.q_positions, x.k_positions).astype(dtype)
        logits += bias if bias.ndim == 4 else bias[None]
    if x.gates is not None:
        logits += sum(
            at_q.transpose(0, 2, 1)[:, :, :, None] - at_k.transpose(0, 2, 1)[:, :, None, :]
            for at_q, at_k in zip(*x.gates, strict=True)
        )
    mask = visible(x.q_order, x.k_order, x.segments, window)[:, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    row_max = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    sinks = None if x.sinks is None else x.sinks.astype(dtype)[None, :, None, None]
    if sinks is not None:
        row_max = jnp.maximum(row_max, jax.lax.stop_gradient(sinks))
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
    weights = jnp.exp(logits - row_max)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - row_max)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(x.v.dtype).reshape(B, K, H // K, T, -1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, x.v, preferred_element_type=dtype)
    return out.reshape(B, T, H, -1).astype(x.v.dtype)
