"""The public functions: checks, and every default filled in."""

from typing import Unpack

import jax
import jax.numpy as jnp

from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.ops.softmax_attention.dispatch import attend, default_block_size
from sympow_jax.ops.softmax_attention.inputs import Gates, Inputs, RingTokens, gates_at_keys, ring_inputs
from sympow_jax.ops.softmax_attention.ring import ring
from sympow_jax.ops.softmax_attention.tile_sums import Softmax
from sympow_jax.typing import Array, Float, Int


def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    log_gates: Float[Array, "B S _"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal softmax attention, out_i = sum_j p_ij v_j,

        p_ij = softmax_j(scale q_i . k_j + bias(i, j) + sum of log_gates over (j, i])   over the visible j.

    Without key_positions, key j is visible to query i when j <= i. With key_positions (a cache, which may be longer
    than the queries), when 0 <= key_position_j <= position_i: unwritten slots hold a later position or -1.

    Args:
      q: queries; H is a multiple of K (grouped queries).
      k: keys.
      v: values.
      log_gates: per token of k, <= 0, for each kv head (K) or query head (H): FoX's forget gates. With
        key_positions, the written slots must be in ascending order.
      bias: additive bias of query and key positions; its params get gradients.
      scale: of the logits; None is 1/sqrt(D).
      segment_ids: documents, in contiguous runs; tokens attend within their own, 0 is padding with output 0.
      positions: absolute positions of the queries; None is 0..T-1.
      key_positions: absolute positions of the keys; None is `positions`.
      window: a query sees the last `window` positions, itself included; None is all.
      sinks: a logit of each head, of a key without a value that all queries see: exp(sink) more in the denominator.
      implementation: "reference", "blockwise", "cudnn" (GPU) or "pallas" (TPU's splash attention), both without gates,
        sinks, key_positions and bias, but for ALiBi on "cudnn", and gates there where nothing is differentiated; None
        is the accelerator's kernel where it can do the call, else goes by size.
      block_size: tile of "blockwise"; None picks by size.

    Returns:
      [B, T, H, Dv] in v's dtype; statistics are float32 (float64 from float64). A row that sees nothing is 0.

    Raises:
      ValueError: shapes or options that do not fit together.
    """
    _check(q, k, v, log_gates, window, sinks)
    _check_cache(q.shape[1], k.shape[1], segment_ids, positions, key_positions)
    _check_tokens(q, segment_ids=segment_ids, positions=positions)
    _check_tokens(k, key_positions=key_positions)
    x = fill_in(q, k, v, log_gates, bias, segment_ids, positions, key_positions, sinks)
    return attend(
        x,
        scale=scale,
        window=window,
        implementation=implementation,
        block_size=block_size,
        cached=key_positions is not None,
    )


def softmax_attention_at(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    query_index: Int[Array, "T"],
    run: int = 0,
    log_gates: Float[Array, "B S _"] | None = None,
    bias: PositionBias | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: str | None = None,
    block_size: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """`softmax_attention` of some tokens of a sequence: those numbered query_index, in any order, of its S tokens.

    log_gates, segment_ids and positions are those of all S tokens; key j is visible to query i when
    j <= query_index_i. It is what a device computes that holds the keys of other devices too. `run`: the index is made
    of runs of so many consecutive numbers, each from a multiple of it on; T if all are consecutive, 0 is unknown.
    """
    _check(q, k, v, log_gates, window, sinks)
    _check_tokens(k, segment_ids=segment_ids, positions=positions)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    gates, segments = None, None
    if log_gates is not None:
        at_keys = gates_at_keys(log_gates, q)
        gates = jax.tree.map(lambda g: g[:, query_index], at_keys), at_keys
    if segment_ids is not None:
        segments = segment_ids[:, query_index], segment_ids
    q_positions, k_positions = (query_index, index) if positions is None else (positions[:, query_index], positions)
    run, order = run if positions is None else 0, (query_index[None], index[None])
    x = Inputs(q, k, v, gates, bias, q_positions, k_positions, *order, segments, sinks, run)
    return attend(x, scale=scale, window=window, implementation=implementation, block_size=block_size, cached=True)


def softmax_attention_ring(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    axis: str,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    block_size: int | None = None,
    **tokens: Unpack[RingTokens],
) -> Float[Array, "B T H Dv"]:
    """`softmax_attention` of a sequence that lies on the devices along a mesh axis, inside shard_map.

    Each device has T of its tokens, in any order, those that `RingTokens` tells of, and holds the keys of T at a time
    (`ring.py`); the gradients of the bias are those of its queries alone. It is a form of `blockwise`.
    """
    gates = tokens.get("gates")
    _check(q, k, v, None if gates is None else gates[0], window, sinks)
    _check_tokens(q, segment_ids=tokens.get("segment_ids"), positions=tokens.get("positions"))
    x = ring_inputs(q, k, v, sinks=sinks, **tokens)
    size = block_size or default_block_size(q.shape, q.shape[1], window, x.bias)
    return ring(
        x,
        axis=axis,
        weights=Softmax(),
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        window=window,
        block_size=size,
    )


def fill_in(q, k, v, log_gates, bias, segment_ids, positions, key_positions, sinks=None) -> Inputs:
    """The arguments of `softmax_attention` as its implementations take them."""
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    if key_positions is None:
        q_order = k_order = index[None]
        q_positions = k_positions = index if positions is None else positions
    else:
        q_order = q_positions = positions
        k_order = k_positions = key_positions
    gates = None
    if log_gates is not None:
        gates = _gates_at_queries_and_keys(log_gates, q, q_order, key_positions)
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    run = q.shape[1] if positions is None and key_positions is None else 0
    return Inputs(q, k, v, gates, bias, q_positions, k_positions, q_order, k_order, segments, sinks, run)


def _gates_at_queries_and_keys(log_gates, q, q_order, key_positions) -> tuple[Gates, Gates]:
    """Cumulative log gates at each query and each key; a query's is that of the last key it sees."""
    if key_positions is None:
        at_keys = gates_at_keys(log_gates, q)
        return at_keys, at_keys
    at_keys = gates_at_keys(jnp.where(key_positions[:, :, None] >= 0, log_gates, 0.0), q)
    reached = jax.lax.cummax(key_positions, axis=1)  # an unwritten slot counts with the written one before it
    last = jax.vmap(lambda slots, now: jnp.searchsorted(slots, now, side="right") - 1)(reached, q_order)
    high, low = (jnp.take_along_axis(g, jnp.maximum(last, 0)[:, :, None], axis=1) for g in at_keys)
    return (high, low), at_keys


def _check_cache(T, S, segment_ids, positions, key_positions):
    if S != T and key_positions is None:
        raise ValueError(f"key_positions=None: {S} keys for {T} queries need their positions; pass both positions")
    if key_positions is not None and positions is None:
        raise ValueError("positions=None: key_positions needs the positions of the queries too")
    if key_positions is not None and segment_ids is not None:
        raise ValueError("segment_ids: not together with key_positions (a cache holds one document); leave one out")


def _check_tokens(x, **named):
    for name, array in named.items():
        if array is not None and array.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {array.shape}; one number a token is {x.shape[:2]}")


def _check(q, k, v, log_gates, window, sinks):
    (B, _, H, D), (S, K) = q.shape, k.shape[1:3]
    if H % K:
        raise ValueError(f"num_heads={H}, num_kv_heads={K}: num_heads must be a multiple of num_kv_heads")
    if log_gates is not None and log_gates.shape[2] not in (K, H):
        raise ValueError(f"log_gates has {log_gates.shape[2]} heads: legal are num_kv_heads={K} or num_heads={H}")
    legal = {"k": (k, (B, S, K, D)), "v": (v, (B, S, K, v.shape[-1])), "sinks": (sinks, (H,))}
    legal["log_gates"] = log_gates, (B, S, *(() if log_gates is None else log_gates.shape[2:]))
    for name, (array, shape) in legal.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; with q {q.shape} and k {k.shape} it must be {shape}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: legal are None or integers >= 1 (1 sees only the token itself)")
