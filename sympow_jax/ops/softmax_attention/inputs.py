"""What every implementation of softmax attention receives, and the one rule of which pairs are visible."""

import dataclasses

import jax
import jax.numpy as jnp

from sympow_jax.ops.position_bias import PositionBias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments with every default filled in.

    Attributes:
      q, k, v: [B, T, H, D], [B, S, K, D], [B, S, K, Dv].
      gates: None, or cumulative log gates in two floats: (high, low) at queries [B, T, H], at keys [B, S, H].
      bias: None or a PositionBias.
      q_positions, k_positions: [T], [S] or [B, T], [B, S]: what the bias sees.
      q_order, k_order: [b, T], [b, S], b 1 or B: key j is visible to query i when 0 <= k_order_j <= q_order_i.
      segments: None or ids at queries and keys, [B, T], [B, S]; 0 is padding.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None
    bias: PositionBias | None
    q_positions: jax.Array
    k_positions: jax.Array
    q_order: jax.Array
    k_order: jax.Array
    segments: tuple[jax.Array, jax.Array] | None


def visible(
    q_order: jax.Array, k_order: jax.Array, segments: tuple[jax.Array, jax.Array] | None, window: int | None
) -> jax.Array:
    """Which pairs attend, [b, q, k]: causal, inside the window, in the same document, and no padding."""
    distance = q_order[:, :, None] - k_order[:, None, :]
    mask = (distance >= 0) & (k_order >= 0)[:, None, :]
    if window is not None:
        mask &= distance < window
    if segments is not None:
        q_ids, k_ids = segments
        mask &= (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids != 0)[:, None, :]
    return mask


def repeat_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[..., K] -> [..., H]: every query head gets the value of its kv head."""
    return x if x.shape[-1] == num_heads else jnp.repeat(x, num_heads // x.shape[-1], axis=-1)
