"""The cache of a softmax layer: keys and values of a stream, written in place and read block by block.

Only blocks that hold written slots are read, so the cost of a token grows with its position and not with the size of
the cache, and one compiled program serves every position. Forward only: training reads whole sequences.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sympow_jax.ops.gates import add_two_floats, cumulative_log_gates
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.ops.softmax_attention.inputs import repeat_heads, visible
from sympow_jax.typing import Array, Float, Int, PyTree, accumulation_dtype

BLOCK_SIZE = 512  # slots read at a time: on 2 CPU cores 256 to 1,024 are alike, and 5 times faster than all at once
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What S slots hold; those from the number of tokens seen on are unwritten.

    Attributes:
      keys: [B, K, S, D].
      values: [B, K, S, Dv].
      positions: [B, S] int32, -1 where unwritten.
      gates: None, or cumulative log gates in two floats (high, low), each [B, S, H] float32.
    """

    keys: PyTree
    values: PyTree
    positions: PyTree
    gates: PyTree


def empty_cache(
    batch_size: int, num_kv_heads: int, length: int, head_dim: int, value_head_dim: int, *, gate_heads: int, dtype: str
) -> KVCache:
    """A cache of `length` unwritten slots; gate_heads = 0 for a layer without gates."""
    gate = jnp.zeros((batch_size, length, gate_heads), jnp.float32)
    return KVCache(
        keys=jnp.zeros((batch_size, num_kv_heads, length, head_dim), dtype),
        values=jnp.zeros((batch_size, num_kv_heads, length, value_head_dim), dtype),
        positions=jnp.full((batch_size, length), -1, jnp.int32),
        gates=(gate, gate) if gate_heads else None,
    )


def append(
    cache: KVCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T H"] | None,
    positions: Int[Array, "B T"],
    offset: Int[Array, ""],
) -> KVCache:
    """The cache after T more tokens, written to the slots from `offset`, the number of tokens seen, on."""

    def write(slots, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), offset, axis)

    gates = cache.gates
    if log_gates is not None:
        last = jnp.maximum(offset - 1, 0)
        before = (jnp.where(offset > 0, jax.lax.dynamic_slice_in_dim(g, last, 1, 1), 0.0) for g in gates)
        gates = add_two_floats(tuple(before), cumulative_log_gates(log_gates))
        gates = tuple(write(slots, new, 1) for slots, new in zip(cache.gates, gates, strict=True))
    return KVCache(
        keys=write(cache.keys, k.swapaxes(1, 2), 2),
        values=write(cache.values, v.swapaxes(1, 2), 2),
        positions=write(cache.positions, positions, 1),
        gates=gates,
    )


def cached_attention(
    q: Float[Array, "B T H D"],
    cache: KVCache,
    *,
    positions: Int[Array, "B T"],
    offset: Int[Array, ""],
    bias: PositionBias | None = None,
    scale: float,
    rotate_keys: Callable[[Array, Array], Array] | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """`softmax_attention` of the last T tokens appended to a cache over everything in it.

    Args:
      q: queries of the tokens in slots offset .. offset + T - 1.
      cache: after `append`.
      positions: of the queries; key j is visible when 0 <= its position <= the query's.
      offset: tokens seen before the queries.
      bias: additive bias of query and key positions.
      scale: of the logits.
      rotate_keys: (keys [B, K, C, D], positions [B, C]) -> rotated keys, for keys that are cached unrotated.
      sinks: as in `softmax_attention`.
    """
    B, T, H, _ = q.shape
    K, S = cache.keys.shape[1:3]
    C, Dv = min(BLOCK_SIZE, S), cache.values.shape[3]
    dtype = accumulation_dtype(q)
    rows = q.reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, -1)
    q_gates = jax.tree.map(lambda g: repeat_heads(jax.lax.dynamic_slice_in_dim(g, offset, T, 1), H), cache.gates)

    def block(j, carry):
        out, total, row_max = carry
        start = jnp.minimum(j * C, S - C)  # the last block may overlap the one before

        def take(slots, axis):
            return jax.lax.dynamic_slice_in_dim(slots, start, C, axis)

        k, v, k_positions = take(cache.keys, 2), take(cache.values, 2), take(cache.positions, 1)
        k = k if rotate_keys is None else rotate_keys(k, k_positions)
        logits = jnp.einsum("bkrd,bksd->bkrs", rows, k.astype(q.dtype), preferred_element_type=dtype) * scale
        logits = logits.reshape(B, H, T, C)
        if bias is not None:
            logits += bias(positions, k_positions).astype(dtype)
        if cache.gates is not None:
            k_gates = jax.tree.map(lambda g: repeat_heads(take(g, 1), H), cache.gates)
            logits += sum(
                at_q.swapaxes(1, 2)[..., None] - at_k.swapaxes(1, 2)[:, :, None]
                for at_q, at_k in zip(q_gates, k_gates, strict=True)
            )
        seen = visible(positions, k_positions, None, None)
        seen &= (start + jnp.arange(C, dtype=jnp.int32) >= j * C)[None, None]
        logits = jnp.where(seen[:, None], logits, _MASKED).reshape(B, K, -1, C)
        new_max = jnp.maximum(row_max, logits.max(-1))
        weights, shrink = jnp.exp(logits - new_max[..., None]), jnp.exp(row_max - new_max)
        update = jnp.einsum("bkrs,bksd->bkrd", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=dtype)
        return out * shrink[..., None] + update, total * shrink + weights.sum(-1), new_max

    shape = rows.shape[:-1]
    start = jnp.zeros((*shape, Dv), dtype), jnp.zeros(shape, dtype), jnp.full(shape, 0.5 * _MASKED, dtype)
    if sinks is not None:  # a key without a value, seen before the others
        start = start[0], jnp.ones(shape, dtype), jnp.broadcast_to(_of_rows(sinks, K, T), shape).astype(dtype)
    out, total, _ = jax.lax.fori_loop(0, (offset + T + C - 1) // C, block, start)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(B, K, H // K, T, Dv).transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dv).astype(q.dtype)


def _of_rows(sinks: Float[Array, "H"], num_kv_heads: int, num_queries: int) -> Float[Array, "1 K R"]:
    """One number a head for each row, the queries of the heads of a kv head."""
    return jnp.repeat(sinks, num_queries).reshape(1, num_kv_heads, -1)
