"""The state of a stream inside a window: the keys and values, and the gates, of its last `window` tokens."""

from collections.abc import Callable

import jax.numpy as jnp

from sympow_jax import ops, sharding
from sympow_jax.layers.tokens import Tokens
from sympow_jax.typing import Array, Float, Int

WindowState = dict[str, Array]


def empty_window(
    batch_size: int, num_kv_heads: int, window: int, head_dim: int, value_head_dim: int, *, gate_heads: int, dtype: str
) -> WindowState:
    """The state before the first token: positions of -1, which no query sees; gate_heads = 0 without gates."""
    B, K, W = batch_size, num_kv_heads, window
    state = {
        "keys": jnp.zeros((B, W, K, head_dim), dtype),
        "values": jnp.zeros((B, W, K, value_head_dim), dtype),
        "positions": jnp.full((B, W), -1, jnp.int32),
    }
    if gate_heads:
        state["log_gates"] = jnp.zeros((B, W, gate_heads), jnp.float32)
    return state


def window_before(tokens: Tokens, positions: Int[Array, "B T"], past: WindowState) -> WindowState:
    """The state that this shard of a sequence continues: the end of the shard before it, `past` for the first one."""
    new = _kept(tokens, positions)
    return {n: sharding.halo(new[n].astype(old.dtype), old.shape[1], old) for n, old in past.items()}


def _kept(tokens: Tokens, positions: Int[Array, "B T"]) -> WindowState:
    """What a state keeps of each token."""
    gates = {} if tokens.log_gates is None else {"log_gates": tokens.log_gates}
    return {"keys": tokens.k, "values": tokens.v, "positions": positions} | gates


def attend_window(
    tokens: Tokens,
    past: WindowState,
    *,
    scale: float,
    bias: ops.PositionBias | None,
    positions: Int[Array, "B T"],
    rotate_keys: Callable[[Array, Array], Array] | None,
    window: int,
) -> tuple[Float[Array, "B T H Dv"], WindowState]:
    """Softmax attention of the next T tokens to themselves and to `past`, and the state after them.

    Args:
      tokens, past: the new tokens, and the state before them.
      scale, bias, positions: as in `ops.softmax_attention`.
      rotate_keys: as in `ops.cache.cached_attention`.
      window: how many tokens a query sees, itself included.
    """
    q, v, new = tokens.q, tokens.v, _kept(tokens, positions)
    visible = {n: jnp.concatenate([old, new[n].astype(old.dtype)], 1) for n, old in past.items()}
    keys = visible["keys"].astype(q.dtype)
    if rotate_keys is not None:
        keys = rotate_keys(keys.swapaxes(1, 2), visible["positions"]).swapaxes(1, 2)
    out = ops.softmax_attention(
        q,
        keys,
        visible["values"].astype(v.dtype),
        log_gates=visible.get("log_gates"),
        bias=bias,
        scale=scale,
        positions=positions,
        key_positions=visible["positions"],
        window=window,
        sinks=tokens.sinks,
    )
    return out, {name: array[:, q.shape[1] :] for name, array in visible.items()}
