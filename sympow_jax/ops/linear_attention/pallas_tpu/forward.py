"""The forward kernel: outputs and normalisers, with the state in VMEM over the chunks of a row."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_shared import dot, inverse
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features, Ref
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import (
    SUBLANES,
    Decays,
    Steps,
    Tiles,
    call,
    each_query,
)
from sympow_jax.typing import Array

F32 = jnp.float32


def add_keys(features: Features, k: Array, v: Array, decays: Decays, state: Ref, moments: Ref) -> None:
    """The state and the second moments after a chunk: those before it, decayed, plus the chunk's keys."""
    x, to_state, carry = k.astype(F32), decays["to_state"], decays.carry
    for block in features.blocks():
        phi = features.expand(block, x, k.dtype, to_state)
        state[:, block.rows] = carry * state[:, block.rows] + dot(v, phi, 1, 1)
    augmented = features.augment(x)
    left, right = (augmented * to_state).astype(k.dtype), augmented.astype(k.dtype)
    moments[...] = carry * moments[...] + dot(left, right, 1, 1)


def read_state(features: Features, x: Array, dtype, state: Ref, moments: Ref) -> tuple[Array, Array]:
    """phi(x) . state and the same of the normaliser: [Dv, c], [1, c]."""
    num = jnp.zeros((), F32)
    for block in features.blocks():
        num += dot(state[:, block.rows].astype(dtype), features.expand(block, x, dtype), 1, 0)
    return num, features.quadratic(x, moments, dtype)[0]


def _kernel(q, k, v, decays, s0, n0, out, den, s, n, state, moments, *, kernel, features, tiles):
    dtype, t = q.dtype, pl.program_id(1)

    @pl.when(t == 0)
    def _():
        state[...] = s0[0]
        moments[...] = n0[0]

    for start in range(0, tiles.block, tiles.chunk):
        at = slice(start, start + tiles.chunk)
        decay = Decays(decays[0, :, at])
        keys, values, pairs = k[0, :, at], v[0, :, at], decay.pairs()

        def queries(g, at=at, decay=decay, keys=keys, values=values, pairs=pairs):
            x = q[0, g, :, at]
            read, total = read_state(features, x.astype(F32), dtype, state, moments)
            weights = kernel.weight(dot(keys.T, x, 1, 0)) * pairs
            num = read * decay["from_state"] + dot(values, weights.astype(dtype), 1, 0)
            total = total * decay["from_state"] + jnp.sum(weights, axis=0, keepdims=True)
            out[0, g, :, at] = (num * inverse(total)).astype(out.dtype)
            den[0, g, :, at] = total

        each_query(q.shape[1], queries)
        add_keys(features, keys, values, decay, state, moments)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        s[0] = state[...]
        n[0] = moments[...]


def forward(kernel: Kernel, features: Features, tiles: Tiles, tokens, decays: Array, before):
    """(out [R, G, Dv, T], den [R, G, 1, T], final state [R, Dv, P], final moments [R, M, M]).

    Args:
      kernel, features: what is computed.
      tiles: T is a multiple of the block.
      tokens: q [R, G, D, T], the G queries of each of R = B K keys; k [R, D, T]; v [R, Dv, T].
      decays: [R, 8, T], float32, see `Decays`.
      before: the state before the first token and its second moments, float32.
    """
    q, _, v = tokens
    R, G, D, T = q.shape
    Dv, P, M = v.shape[1], features.rows, features.moments
    steps = Steps(tiles.block, T // tiles.block)
    block, states = steps.of_tokens, [steps.of_states(Dv, P), steps.of_states(M, M)]
    return call(
        "forward",
        functools.partial(_kernel, kernel=kernel, features=features, tiles=tiles),
        steps,
        (*tokens, decays, *before),
        blocks=[block(G, D), block(D), block(Dv), block(SUBLANES), *states],
        out=[
            ((R, G, Dv, T), v.dtype, block(G, Dv)),
            ((R, G, 1, T), F32, block(G, 1)),
            ((R, Dv, P), F32, states[0]),
            ((R, M, M), F32, states[1]),
        ],
        scratch=[(Dv, P), (M, M)],
        macs=(G + 1) * (P * Dv + M * M) + G * tiles.chunk * (D + Dv),
    )
