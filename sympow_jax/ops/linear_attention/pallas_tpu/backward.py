"""The backward kernels: gradients of queries with the state going forward, of keys and values with its cotangent back.

Nothing is kept of the forward pass but den: the first kernel makes the states again as the forward pass did, and the
second carries their cotangents, from the last chunk to the first. The cotangent of the numerators is dnum = dout / den,
that of the normalisers dden = -out . dnum. bfloat16 products round dnum and the state, so the first kernel takes the
dden that belongs to what it rounded, from num . dnum = sum_j w_ij v_j . dnum_i: then the large terms of dq still
cancel. The gate gradient is likewise summed up from v_j . dnum_i + dden_i, which is small, and not from its two parts.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_shared import dot, inverse
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features, Ref
from sympow_jax.ops.linear_attention.pallas_tpu.forward import add_keys
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


def _dnum(den: Array, dout: Array) -> Array:
    """The cotangent of the numerators in the dtype that products take."""
    return (dout.astype(F32) * inverse(den)).astype(dout.dtype)


def _queries_kernel(q, k, v, decays, den, dout, s0, n0, dq, dden, state, moments, *, kernel, features, tiles):
    dtype = q.dtype

    @pl.when(pl.program_id(1) == 0)
    def _():
        state[...] = s0[0]
        moments[...] = n0[0]

    for start in range(0, tiles.block, tiles.chunk):
        at = slice(start, start + tiles.chunk)
        decay = Decays(decays[0, :, at])
        keys, values, pairs = k[0, :, at], v[0, :, at], decay.pairs()

        def queries(g, at=at, decay=decay, keys=keys, values=values, pairs=pairs):
            low, normaliser = q[0, g, :, at], den[0, g, :, at]
            x, sums = low.astype(F32), {}
            dnum = _dnum(normaliser, dout[0, g, :, at])
            for block in features.blocks():
                features.contract(block, dot(state[:, block.rows].astype(dtype), dnum, 0, 0), x, sums)
            value, linear = features.gradient(x, sums)
            scores, dweights = dot(keys.T, low, 1, 0), dot(values.T, dnum, 1, 0)
            weights = kernel.weight(scores) * pairs
            total = value * decay["from_state"] + jnp.sum(weights * dweights, axis=0, keepdims=True)
            offset = -total * inverse(normaliser)
            read = (linear + offset * features.quadratic(x, moments, dtype)[1]) * decay["from_state"]
            dscores = (dweights + offset) * pairs * kernel.derivative(scores)
            dq[0, g, :, at] = (read + dot(keys, dscores.astype(dtype), 1, 0)).astype(dtype)
            dden[0, g, :, at] = offset

        each_query(q.shape[1], queries)
        add_keys(features, keys, values, decay, state, moments)


def state_gradients(
    features: Features, k: Array, v: Array, decays: Decays, dstate: Ref, dmoments: Ref
) -> tuple[Array, Array, Array]:
    """From the cotangent of the state after a chunk: the gradients of its k and v, and what their decay multiplies."""
    dtype, x, to_state = k.dtype, k.astype(F32), decays["to_state"]
    sums, dv = {}, jnp.zeros((), F32)
    for block in features.blocks():
        part = dstate[:, block.rows].astype(dtype)
        dv += dot(part, features.expand(block, x, dtype), 1, 0)
        features.contract(block, dot(part, v, 0, 0), x, sums)
    augmented = features.augment(x)
    product = dot(dmoments[...].astype(dtype), augmented.astype(dtype), 1, 0)
    value, dk = features.gradient(x, sums)
    value += jnp.sum(augmented * product, axis=0, keepdims=True)
    dk += 2.0 * product[: features.head_dim]
    return dk * to_state, dv * to_state, value * to_state


def _add_queries(
    features: Features, x: Array, dnum: Array, dden: Array, decays: Decays, dstate: Ref, dmoments: Ref
) -> None:
    """Adds what the queries of a chunk read of the state before it to the cotangent of that state."""
    dtype, from_state = dnum.dtype, decays["from_state"]
    for block in features.blocks():
        dstate[:, block.rows] += dot(dnum, features.expand(block, x, dtype, from_state), 1, 1)
    dmoments[...] += features.moments_cotangent(x, dden * from_state, dtype)


def _keys_kernel(
    q, k, v, decays, den, dout, dden, dsf, dnf,
    dk, dv, dgate, ds0, dn0, dstate, dmoments, dkeys, dvalues, dlog, *, kernel, features, tiles,
):  # fmt: skip
    dtype, t = k.dtype, pl.program_id(1)

    @pl.when(t == 0)
    def _():
        dstate[...] = dsf[0]
        dmoments[...] = dnf[0]

    for start in reversed(range(0, tiles.block, tiles.chunk)):
        at = slice(start, start + tiles.chunk)
        decay = Decays(decays[0, :, at])
        keys, values, pairs = k[0, :, at], v[0, :, at], decay.pairs()
        dkeys[...], dvalues[...], dlog[...] = state_gradients(features, keys, values, decay, dstate, dmoments)
        dstate[...] = decay.carry * dstate[...]
        dmoments[...] = decay.carry * dmoments[...]

        def queries(g, at=at, decay=decay, keys=keys, values=values, pairs=pairs):
            x, offset = q[0, g, :, at], dden[0, g, :, at]
            dnum = _dnum(den[0, g, :, at], dout[0, g, :, at])
            scores = dot(keys.T, x, 1, 0)
            weights = kernel.weight(scores) * pairs
            dweights = dot(values.T, dnum, 1, 0) + offset
            dscores = dweights * pairs * kernel.derivative(scores)
            dvalues[...] += dot(dnum, weights.astype(dtype), 1, 1)
            dkeys[...] += dot(x, dscores.astype(dtype), 1, 1)
            row = jnp.sum(weights * dweights, axis=1, keepdims=True)
            dlog[...] += jnp.broadcast_to(row, weights.shape).T[:1]
            _add_queries(features, x.astype(F32), dnum, offset, decay, dstate, dmoments)

        each_query(q.shape[1], queries)
        dk[0, :, at] = dkeys[...].astype(dtype)
        dv[0, :, at] = dvalues[...].astype(dtype)
        dgate[0, :, at] = -dlog[...]

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        ds0[0] = dstate[...]
        dn0[0] = dmoments[...]


def queries_backward(kernel: Kernel, features: Features, tiles: Tiles, tokens, decays, den, dout, before):
    """dq [R, G, D, T] and dden [R, G, 1, T]; arguments as in `forward`, with its den and the cotangent of its out."""
    q, _, v = tokens
    R, G, D, T = q.shape
    Dv, P, M = v.shape[1], features.rows, features.moments
    steps = Steps(tiles.block, T // tiles.block)
    block, states = steps.of_tokens, [steps.of_states(Dv, P), steps.of_states(M, M)]
    return call(
        "backward_queries",
        functools.partial(_queries_kernel, kernel=kernel, features=features, tiles=tiles),
        steps,
        (*tokens, decays, den, dout, *before),
        blocks=[block(G, D), block(D), block(Dv), block(SUBLANES), block(G, 1), block(G, Dv), *states],
        out=[((R, G, D, T), q.dtype, block(G, D)), ((R, G, 1, T), F32, block(G, 1))],
        scratch=[(Dv, P), (M, M)],
        macs=(G + 1) * (P * Dv + M * M) + G * tiles.chunk * (2 * D + Dv),
    )


def keys_backward(kernel: Kernel, features: Features, tiles: Tiles, tokens, decays, den, dout, dden, dafter):
    """(dk, dv, dgates, ds0, dn0) from dden and the cotangents of out and of the final state.

    dgates [R, 1, T] is the gradient of the cumulative log gates, without what the final state adds at the end.
    """
    q, k, v = tokens
    R, G, D, T = q.shape
    Dv, P, M = v.shape[1], features.rows, features.moments
    steps = Steps(tiles.block, T // tiles.block, backwards=True)
    block, states = steps.of_tokens, [steps.of_states(Dv, P), steps.of_states(M, M)]
    inputs = [block(G, D), block(D), block(Dv), block(SUBLANES), block(G, 1), block(G, Dv), block(G, 1)]
    return call(
        "backward_keys",
        functools.partial(_keys_kernel, kernel=kernel, features=features, tiles=tiles),
        steps,
        (*tokens, decays, den, dout, dden, *dafter),
        blocks=[*inputs, *states],
        out=[
            ((R, D, T), k.dtype, block(D)),
            ((R, Dv, T), v.dtype, block(Dv)),
            ((R, 1, T), F32, block(1)),
            ((R, Dv, P), F32, states[0]),
            ((R, M, M), F32, states[1]),
        ],
        scratch=[(Dv, P), (M, M), (D, tiles.chunk), (Dv, tiles.chunk), (1, tiles.chunk)],
        macs=(G + 2) * P * Dv + (G + 1) * M * M + 2 * G * tiles.chunk * (D + Dv),
    )
