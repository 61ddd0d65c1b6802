"""Attention on one stretch of a sequence whose other stretches are on other devices (context parallelism).

Everything here runs inside `sharding.over_shards`, on a `seq` axis of more than one device. Linear kernels and
learned positions first gather one number a head and shard, the total decay (one a dim, of vector gates) and the total
rotation (one a frequency, where each has its own), and then the states: each shard continues from the weighted sum of
those before it, as it would in a stream. Keys and values of softmax are gathered where they are few, or go around;
inside a window a shard gets the few before its first token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax import ops, sharding
from sympow_jax.layers.context import Context
from sympow_jax.layers.tokens import Tokens
from sympow_jax.ops.gates import finite_log_gates
from sympow_jax.typing import Array, Bool, Float, Int

Totals = dict[str, Array]
# Bytes of gathered keys and values of a layer up to which gathering them is planned to cost less than passing them
# around (docs/plans): a ring sends 1.5 times as much and more often, and its memory is what does not grow.
LARGEST_GATHER = 1 << 30
Past = ops.LinearState | ops.positions.PhaseState


def gather_totals(
    beta: Float[Array, "B T K *F"] | None,
    log_gates: Float[Array, "B T G *D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> Totals:
    """What each shard does to what passes through it, of every shard, [shards, B, ...]; {} if nothing.

    "log_decay", the sum of its log gates; "integer", "fraction" and "twin", the sum of beta over its last document,
    exactly, and 0 with its gradient; "first", "last" and "uniform", the ends of its segment ids.
    """
    totals = {}
    if log_gates is not None:
        totals["log_decay"] = jnp.sum(finite_log_gates(log_gates), axis=1)
    if segment_ids is not None:
        uniform = jnp.all(segment_ids == segment_ids[:, :1], axis=1)
        totals |= {"first": segment_ids[:, 0], "last": segment_ids[:, -1], "uniform": uniform.astype(jnp.int32)}
    if beta is not None:
        phase = ops.positions.phase_state(beta, segment_ids)
        totals |= {"integer": phase.integer, "fraction": phase.fraction, "twin": phase.twin}
    return sharding.gather(totals)


def _ends_before(totals: Totals, past: Past | None) -> Int[Array, "shards B"]:
    """The document that is before each shard; for the first one that of `past`, or, without one, its own first."""
    start = totals["first"][:1] if past is None else past.segment_id[None]
    return jnp.concatenate([start, totals["last"][:-1]])


def _open(totals: Totals, batch_size: int, past: Past | None) -> Bool[Array, "shards B"]:
    """Which shards lie wholly in the document that is before them, [shards, B]."""
    if "last" not in totals:
        return jnp.ones((sharding.axis_size("seq"), batch_size), bool)
    return (totals["uniform"] == 1) & (totals["first"] == _ends_before(totals, past))


def phase_before(totals: Totals, past: ops.positions.PhaseState | None) -> ops.positions.PhaseState:
    """The learned position that this shard continues, exactly, and a twin with the gradient of all that is before it.

    `past` is what the first shard continues; it counts as a shard before that.
    """
    p, shard = jax.lax.axis_index("seq"), jnp.arange(sharding.axis_size("seq"))
    integer, fraction, twin = totals["integer"], totals["fraction"], totals["twin"]
    B = integer.shape[1]
    source, is_open, document = shard, _open(totals, B, past), jnp.zeros(B, jnp.int32)
    if past is not None:
        before = jnp.zeros_like(twin[0]) if past.twin is None else past.twin
        integer, fraction, twin = (
            jnp.concatenate([a[None], b])
            for a, b in ((past.integer, integer), (past.fraction, fraction), (before, twin))
        )
        source, document = jnp.concatenate([shard[:1] - 1, shard]), past.segment_id
    between = (shard[None, :] > source[:, None]) & (shard < p)[None, :]
    kept = jnp.all(is_open[None] | ~between[..., None], axis=1) & (source < p)[:, None]  # [sources, B]
    integer, fraction = ops.positions.sum_phases(integer, fraction, kept)
    twin = jnp.sum(jnp.where(kept.reshape(*kept.shape, *[1] * (twin.ndim - 2)), twin, 0.0), axis=0)
    if "last" in totals:
        document = _ends_before(totals, past)[p]
    return ops.positions.PhaseState(integer, fraction, document, twin)


def _extended(state: ops.LinearState) -> Float[Array, "B K P Dv1"]:
    return jnp.concatenate([state.state, state.normalizer[..., None]], axis=-1)


def state_before(
    kernel: ops.Kernel, totals: Totals, own: ops.LinearState, past: ops.LinearState | None
) -> ops.LinearState:
    """The kernel state that this shard continues, from the state that its own tokens leave behind.

    `past` is what the first shard continues.
    """
    extended, start = _extended(own), None if past is None else _extended(past)
    B, K = extended.shape[:2]
    log_decays = totals.get("log_decay", jnp.zeros((sharding.axis_size("seq"), B, K), extended.dtype))
    left = functools.partial(ops.state_decay, kernel)
    before = sharding.states_before(extended, log_decays, _open(totals, B, past), start, left)
    document = (own if past is None else past).segment_id
    if "last" in totals:
        document = _ends_before(totals, past)[jax.lax.axis_index("seq")]
    return dataclasses.replace(own, state=before[..., :-1], normalizer=before[..., -1], segment_id=document)


def attend(
    tokens: Tokens, bias: ops.PositionBias | None, context: Context, *, implementation: str | None, **options: Any
) -> Float[Array, "B T H Dv"]:
    """Softmax attention to the keys and values of all shards: gathered where they are few, else passed around."""
    options["sinks"] = tokens.sinks
    if implementation in (None, "blockwise") and gathered_bytes(tokens) > LARGEST_GATHER:
        return attend_ring(ops.softmax_attention_ring, tokens, bias, context, **options)
    return attend_gathered(tokens, bias, context, implementation=implementation, **options)


def gathered_bytes(tokens: Tokens) -> int:
    """What a device would hold of the keys and values of all shards in a layer."""
    return sharding.axis_size("seq") * (tokens.k.nbytes + tokens.v.nbytes)


def attend_ring(
    ring: Callable[..., Array], tokens: Tokens, bias: ops.PositionBias | None, context: Context, **options: Any
) -> Float[Array, "B T H Dv"]:
    """Attention to the keys and values of all shards, which visit each in turn; `ring` is that of the kernel.

    Under a causal mask a query of an early half-shard sees few of them; with an early and a late one on each shard
    (striped attention, arXiv 2311.09431, by halves) every step is as much work on every shard.
    """
    known: dict[str, Any] = {**_present(None, bias, context)}
    if tokens.log_gates is not None:
        known["gates"] = cumulative_gates(tokens.log_gates)
    q, k, v, known = jax.tree.map(sharding.to_zigzag, (tokens.q, tokens.k, tokens.v, known))
    index, run = sharding.zigzag_index(tokens.q.shape[1]), tokens.q.shape[1] // 2
    return sharding.from_zigzag(ring(q, k, v, axis="seq", index=index, run=run, bias=bias, **known, **options))


def cumulative_gates(log_gates: Float[Array, "B T G"]) -> tuple[Float[Array, "B T G"], Float[Array, "B T G"]]:
    """Cumulative log gates of this shard's tokens over the whole sequence, in two floats."""
    own = ops.gates.cumulative_log_gates(log_gates)
    ends = jax.lax.associative_scan(ops.gates.add_two_floats, sharding.gather(tuple(x[:, -1] for x in own)))
    p = jax.lax.axis_index("seq")
    before = (jnp.where(p == 0, 0.0, x[p - 1])[:, None] for x in ends)
    return ops.gates.add_two_floats(tuple(before), own)


def attend_gathered(
    tokens: Tokens, bias: ops.PositionBias | None, context: Context, **options: Any
) -> Float[Array, "B T H Dv"]:
    """Softmax attention to the gathered keys and values of all shards, with balanced causal work."""
    D = tokens.k.shape[-1]
    k, v = jnp.split(sharding.gather_time(jnp.concatenate([tokens.k, tokens.v], axis=-1)), [D], axis=-1)
    known = sharding.gather(_present(tokens.log_gates, bias, context))
    known = {name: jnp.moveaxis(x, 0, 1).reshape(k.shape[0], -1, *x.shape[3:]) for name, x in known.items()}
    q, index = sharding.to_zigzag(tokens.q), sharding.zigzag_index(tokens.q.shape[1])
    known |= {"query_index": index, "run": q.shape[1] // 2, "bias": bias}
    return sharding.from_zigzag(ops.softmax_attention_at(q, k, v, **known, **options))


def attend_window(
    tokens: Tokens, bias: ops.PositionBias | None, context: Context, *, window: int, **options: Any
) -> Float[Array, "B T H Dv"]:
    """Softmax attention inside a window, to this shard's keys and values and the `window` - 1 before them."""
    q, B = tokens.q, tokens.q.shape[0]
    known = {"kv": jnp.concatenate([tokens.k, tokens.v], axis=-1)} | _present(tokens.log_gates, bias, context)
    known = {name: jnp.concatenate([sharding.halo(x, window - 1), x], axis=1) for name, x in known.items()}
    k, v = jnp.split(known.pop("kv"), [tokens.k.shape[-1]], axis=-1)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    if bias is not None and not bias.of_distance and context.positions is None:
        known["positions"] = jnp.broadcast_to(context.offset - (window - 1) + index[None], (B, index.size))
    if context.segment_ids is None:  # before the first shard there is nothing
        exists = (context.offset > 0) | (index >= window - 1)
        known["segment_ids"] = jnp.broadcast_to(exists.astype(jnp.int32)[None], (B, index.size))
    return ops.softmax_attention_at(
        *(q, k, v),
        query_index=index[window - 1 :],
        run=q.shape[1],
        bias=bias,
        window=window,
        sinks=tokens.sinks,
        **known,
        **options,
    )


def _present(
    log_gates: Float[Array, "B T G"] | None, bias: ops.PositionBias | None, context: Context
) -> dict[str, Array]:
    """What softmax needs to know of each key besides its vectors."""
    positions = context.positions if bias is not None else None
    found = {"log_gates": log_gates, "segment_ids": context.segment_ids, "positions": positions}
    return {name: x for name, x in found.items() if x is not None}
