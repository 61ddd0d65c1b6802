"""What the shards of a sequence tell each other, inside `over_shards`: one collective a call, gradients included.

Shard p of P holds tokens p T/P .. (p + 1) T/P - 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.sharding.mesh import axis_size
from sympow_jax.typing import Array, Float, PyTree

SEQ = "seq"
# Bytes that a device may receive by one all-gather of states before log2(P) steps, which move fewer bytes in more
# messages, are taken instead. Below it, messages cost more than bytes on any current interconnect (derived).
SMALL_GATHER = 1 << 20


def gather(tree: PyTree) -> PyTree:
    """Every leaf [...] of every shard, [P, ...], by one all-gather of all leaves; they must have 32 bits.

    The gradient of a float leaf is summed over the shards, all leaves by one reduce-scatter.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _gather(*leaves)) if leaves else tree


@jax.custom_vjp
def _gather(*leaves):
    words = [jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1) for leaf in leaves]
    rows = jax.lax.all_gather(jnp.concatenate(words), SEQ)
    parts = jnp.split(rows, np.cumsum([word.size for word in words])[:-1], axis=1)
    return [
        jax.lax.bitcast_convert_type(part, leaf.dtype).reshape(-1, *leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]


def _gather_forward(*leaves):
    return _gather(*leaves), leaves


def _gather_backward(leaves, cotangents):
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    gradients: list[Any] = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    if floats:
        flat = jnp.concatenate([cotangents[i].reshape(axis_size(SEQ), -1) for i in floats], axis=1)
        row = jax.lax.psum_scatter(flat, SEQ)
        for i, part in zip(floats, jnp.split(row, np.cumsum([leaves[i].size for i in floats])[:-1]), strict=True):
            gradients[i] = part.reshape(leaves[i].shape)
    return tuple(gradients)


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def gather_time(x: Float[Array, "B t *rest"]) -> Float[Array, "B T *rest"]:
    """The whole time dim of x, on every shard; its gradient is summed over the shards in float32."""
    return jax.lax.all_gather(x, SEQ, axis=1, tiled=True)


def _gather_time_backward(empty, cotangent):
    summed = jax.lax.psum_scatter(cotangent.astype(jnp.float32), SEQ, scatter_dimension=1, tiled=True)
    return (summed.astype(empty.dtype),)


gather_time.defvjp(lambda x: (gather_time(x), x[:0]), _gather_time_backward)


def halo(x: Array, width: int, past: Array | None = None) -> Array:
    """The `width` entries of the time dim before this shard's first, [B, width, ...].

    Before the first shard there are those of `past`, by default zeros.
    """
    last = x[:, x.shape[1] - width :]
    P = axis_size(SEQ)
    before = jax.lax.ppermute(last, SEQ, [(p, p + 1) for p in range(P - 1)]) if P > 1 else jnp.zeros_like(last)
    return before if past is None else jnp.where(jax.lax.axis_index(SEQ) == 0, past.astype(x.dtype), before)


def from_last(tree: PyTree) -> PyTree:
    """What the last shard holds, on every shard."""
    if axis_size(SEQ) == 1:
        return tree
    is_last = jax.lax.axis_index(SEQ) == axis_size(SEQ) - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), SEQ), tree)


def states_before(
    state: Float[Array, "B K P Dv1"],
    log_decays: Float[Array, "shards B K *D"],
    is_open: Array,
    past: Float[Array, "B K P Dv1"] | None,
    left: Callable[[Array], Array],
) -> Float[Array, "B K P Dv1"]:
    """The state that shard p continues, decay(0 .. p-1) past + sum_(r < p) decay(r+1 .. p-1) state_r.

    decay(a .. b) = exp(log_decays_a + ... + log_decays_b), or 0 where one of those shards is not open, that is, begins
    a new document. By one all-gather, or, if that is much to receive, by ceil(log2 P) steps that each double the reach.

    Args:
      state: what this shard's own tokens leave behind.
      log_decays, is_open [shards, B]: of every shard, the same everywhere.
      past: what the first shard continues, or None.
      left: what gates [B, K, *D] leave of a state, [B, K, P or 1, 1].
    """
    P, p = axis_size(SEQ), jax.lax.axis_index(SEQ)
    decay = functools.partial(_decay, log_decays, is_open, left)
    if past is not None:
        return states_before(state, log_decays, is_open, None, left) + decay(0, p) * past
    if (P - 1) * state.size * state.dtype.itemsize <= SMALL_GATHER:
        weights = jnp.stack([jnp.where(r < p, decay(r + 1, p), 0.0) for r in range(P)])[..., 0]
        if weights.shape[3] == 1:
            return jnp.einsum("sbk,sbkpe->bkpe", weights[..., 0], gather(state))
        return jnp.einsum("sbkp,sbkpe->bkpe", weights, gather(state))
    before, reach, distance = jnp.zeros_like(state), state, 1
    while distance < P:
        received = jax.lax.ppermute(reach, SEQ, [(r, r + distance) for r in range(P - distance)])
        before += decay(p - distance + 1, p) * received
        if 2 * distance < P:
            reach += decay(p - distance + 1, p + 1) * received
        distance *= 2
    return before


def _decay(log_decays: Array, is_open: Array, left: Callable, first: Array | int, stop: Array | int) -> Array:
    """What is left of a state after shards first .. stop - 1, [B, K, P or 1, 1]."""
    shard = jnp.arange(log_decays.shape[0])
    passed = (shard >= first) & (shard < stop)
    total = jnp.sum(jnp.where(jnp.expand_dims(passed, range(1, log_decays.ndim)), log_decays, 0.0), axis=0)
    survives = jnp.all(jnp.where(passed[:, None], is_open, True), axis=0)
    return jnp.where(survives[:, None, None, None], left(jnp.exp(total)), 0.0)


def to_zigzag(x: Array) -> Array:
    """This shard's tokens of the time dim exchanged for those of half-shards p and 2P - 1 - p, in that order.

    Under a causal mask half-shard h meets h + 1 of them, so that every shard gets the same work.
    """
    even, odd = jnp.split(x, 2, axis=1)
    even, odd = (_permute(part, parity) for parity, part in enumerate((even, odd)))
    return jnp.where(_even_first(), jnp.concatenate([even, odd], 1), jnp.concatenate([odd, even], 1))


def from_zigzag(x: Array) -> Array:
    """The inverse of `to_zigzag`."""
    low, high = jnp.split(x, 2, axis=1)
    first = _even_first()
    even, odd = jnp.where(first, low, high), jnp.where(first, high, low)
    return jnp.concatenate([_permute(part, i, back=True) for i, part in enumerate((even, odd))], axis=1)


def zigzag_index(length: int) -> Array:
    """Which tokens of the whole sequence `to_zigzag` brings here, [length]."""
    half, p = length // 2, jax.lax.axis_index(SEQ)
    index = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([p * half + index, (2 * axis_size(SEQ) - 1 - p) * half + index])


def _permute(part: Array, parity: int, *, back: bool = False) -> Array:
    """Half-shard 2r + parity from shard r to the shard that works on it, or back."""
    P = axis_size(SEQ)
    pairs = [(r, min(2 * r + parity, 2 * P - 1 - 2 * r - parity)) for r in range(P)]
    return jax.lax.ppermute(part, SEQ, [(b, a) for a, b in pairs] if back else pairs)


def _even_first() -> Array:
    """Of half-shards p and 2P - 1 - p, the even one is p."""
    return jax.lax.axis_index(SEQ) % 2 == 0
