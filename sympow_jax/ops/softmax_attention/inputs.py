"""What every implementation of softmax attention receives, and the one rule of which pairs are visible."""

import dataclasses
from typing import Required, TypedDict

import jax
import jax.numpy as jnp

from sympow_jax.ops.gates import cumulative_log_gates
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.typing import Array, Bool, Float, Int, accumulation_dtype

Gates = tuple[jax.Array, jax.Array]  # cumulative log gates in two floats, (high, low), each [B, T or S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments with every default filled in.

    Attributes:
      q, k, v: [B, T, H, D], [B, S, K, D], [B, S, K, Dv].
      gates: None, or those at queries and at keys.
      bias: None or a PositionBias.
      q_positions, k_positions: [T], [S] or [B, T], [B, S]: what the bias sees.
      q_order, k_order: [b, T], [b, S], b 1 or B: key j is visible to query i when 0 <= k_order_j <= q_order_i.
      segments: None or ids at queries and keys, [B, T], [B, S]; 0 is padding.
      sinks: None or [H], the logit of a key without a value that every query of a head sees.
      run: length of the runs of consecutive positions, of queries and of keys, each from a multiple of it on, that
        the positions are known to be made of; T if all of them are consecutive, and 0 if nothing is known.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: tuple[Gates, Gates] | None
    bias: PositionBias | None
    q_positions: jax.Array
    k_positions: jax.Array
    q_order: jax.Array
    k_order: jax.Array
    segments: tuple[jax.Array, jax.Array] | None
    sinks: jax.Array | None = None
    run: int = dataclasses.field(default=0, metadata={"static": True})

    def bias_on(self, num_positions: int, block_size: int) -> PositionBias | None:
        """The bias for blocks of tokens among the positions 0..num_positions - 1: of their distance where it can be."""
        aligned = self.run % block_size == 0
        if self.bias is None or not self.run or not (aligned or self.run == self.q.shape[1]):
            return self.bias
        return self.bias.on_consecutive(num_positions + (0 if aligned else block_size), block_size)


class RingTokens(TypedDict, total=False):
    """What the forms on a ring of devices are told of the tokens that a device holds, besides q, k and v.

    Attributes:
      index: which tokens of the whole sequence these are.
      run: the index is made of runs of so many consecutive numbers, each from a multiple of it on; absent is unknown.
      gates: cumulative log gates over the whole sequence in two floats, each [B, T, K] or [B, T, H].
      bias, segment_ids: as without a ring.
      positions: of these tokens, for the bias; None is `index`.
    """

    index: Required[Int[Array, "T"]]
    run: int
    gates: Gates | None
    bias: PositionBias | None
    segment_ids: Int[Array, "B T"] | None
    positions: Int[Array, "B T"] | None


def ring_inputs(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    index: Int[Array, "T"],
    run: int = 0,
    gates: Gates | None = None,
    bias: PositionBias | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Inputs:
    """Those of `RingTokens` as the implementations take them."""
    at_keys = None if gates is None else (repeat_heads(gates[0], q.shape[2]), repeat_heads(gates[1], q.shape[2]))
    at = index if positions is None else positions
    return Inputs(
        *(q, k, v),
        gates=None if at_keys is None else (at_keys, at_keys),
        bias=bias,
        q_positions=at,
        k_positions=at,
        q_order=index[None],
        k_order=index[None],
        segments=None if segment_ids is None else (segment_ids, segment_ids),
        sinks=sinks,
        run=run if positions is None else 0,
    )


def visible(
    q_order: Int[Array, "b q"],
    k_order: Int[Array, "b k"],
    segments: tuple[Int[Array, "B q"], Int[Array, "B k"]] | None,
    window: int | None,
) -> Bool[Array, "_ q k"]:
    """Which pairs attend, [b, q, k]: causal, inside the window, in the same document, and no padding."""
    distance = q_order[:, :, None] - k_order[:, None, :]
    mask = (distance >= 0) & (k_order >= 0)[:, None, :]
    if window is not None:
        mask &= distance < window
    if segments is not None:
        q_ids, k_ids = segments
        mask &= (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids != 0)[:, None, :]
    return mask


def gates_at_keys(log_gates: Float[Array, "B S _"], q: Float[Array, "B T H D"]) -> Gates:
    """Cumulative log gates of every key, in two floats, for each query head."""
    pair = cumulative_log_gates(log_gates.astype(accumulation_dtype(log_gates, q)))
    return repeat_heads(pair[0], q.shape[2]), repeat_heads(pair[1], q.shape[2])


def repeat_heads(x: Float[Array, "B S _"], num_heads: int) -> Float[Array, "B S {num_heads}"]:
    """[..., K] -> [..., H]: every query head gets the value of its kv head."""
    return x if x.shape[-1] == num_heads else jnp.repeat(x, num_heads // x.shape[-1], axis=-1)
