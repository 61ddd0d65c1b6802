"""The backward kernels: gradients of queries with the state going forward, of keys and values with its cotangent back.

Nothing is kept of the forward pass but out and den: the first kernel makes the states again as the forward pass did,
and the second carries their cotangents, from the last chunk to the first. The cotangent of the numerators is
dnum = dout / den, that of the normalisers dden = -out . dnum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.pallas_tpu.features import SUBLANES, Features, Ref
from sympow_jax.ops.linear_attention.pallas_tpu.forward import add_keys
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import Decays, Tiles, compiler_params, dot, each, inverse
from sympow_jax.typing import Array

F32 = jnp.float32


def _cotangents(out: Array, den: Array, dout: Array) -> tuple[Array, Array]:
    """dnum, rounded to the dtype that products take, and dden, float32, of that dnum: their error has no bias."""
    dnum = (dout.astype(F32) * inverse(den)).astype(dout.dtype)
    return dnum, -jnp.sum(out.astype(F32) * dnum.astype(F32), axis=0, keepdims=True)


def _queries_kernel(
    q, k, v, decays, out, den, dout, s0, n0, dq, state, moments, phi, rotated, *, kernel, features, tiles
):
    dtype, sub = q.dtype, tiles.pairs

    @pl.when(pl.program_id(1) == 0)
    def _():
        state[...] = s0[0]
        moments[...] = n0[0]

    def chunk(index):
        start = index * tiles.chunk
        at = pl.ds(start, tiles.chunk)
        decay = Decays(decays[0, :, at])
        keys, values = k[0, :, at], v[0, :, at]
        transposed, keys_t, values_t = decay.rows.T, keys.T, values.T

        def queries(g):
            x = q[0, g, :, at]
            dnum, dden = _cotangents(out[0, g, :, at], den[0, g, :, at], dout[0, g, :, at])
            features.rotate(x.astype(F32), rotated.at[0])
            sums = {}
            for block in features.blocks():
                rows = slice(block[0], block[0] + block[1])
                dphi = dot(state[:, rows].astype(dtype), dnum, 0, 0)
                features.contract(block, dphi, rotated.at[0], sums)
            _, quadratic = features.quadratic(x.astype(F32), moments, dtype)
            total = (features.gradient(sums) + dden * quadratic) * decay["from_state"]
            for i in range(0, tiles.chunk, sub):
                part = total[:, i : i + sub]
                for j in range(0, i + sub, sub):
                    scores = dot(keys_t[j : j + sub], x[:, i : i + sub], 1, 0)
                    dweights = dot(values_t[j : j + sub], dnum[:, i : i + sub], 1, 0) + dden[:, i : i + sub]
                    dscores = dweights * decay.pairs(transposed, i, j, sub) * kernel.derivative(scores)
                    part += dot(keys[:, j : j + sub], dscores.astype(dtype), 1, 0)
                dq[0, g, :, pl.ds(start + i, sub)] = part.astype(dtype)

        each(q.shape[1], queries)
        add_keys(features, keys, values, decay, state, moments, phi, rotated.at[1])

    each(tiles.block // tiles.chunk, chunk)


def state_gradients(
    features: Features, k: Array, v: Array, decays: Decays, dstate: Ref, dmoments: Ref, phi: Ref, rotated: Ref
) -> tuple[Array, Array, Array]:
    """Gradients of k, v and of the ones beside v (one row) from the cotangent of the state after their chunk."""
    dtype, x, to_state = k.dtype, k.astype(F32), decays["to_state"]
    features.rotate(x, rotated)
    sums, dv = {}, jnp.zeros((), F32)
    for block in features.blocks():
        rows = slice(block[0], block[0] + block[1])
        features.expand(block, rotated, phi)
        part = dstate[:, rows].astype(dtype)
        dv += dot(part, phi[rows], 1, 0)
        features.contract(block, dot(part, v, 0, 0), rotated, sums)
    augmented = features.augment(x)
    product = dot(dmoments[...].astype(dtype), augmented.astype(dtype), 1, 0)
    dones = jnp.sum(augmented * product, axis=0, keepdims=True)
    dk = features.gradient(sums) + 2.0 * product[: features.head_dim]
    return dk * to_state, dv * to_state, dones * to_state


def _add_queries(
    features: Features, x: Array, dnum: Array, dden: Array, decays: Decays, dstate: Ref, dmoments: Ref, phi, rotated
) -> None:
    """Adds what the queries of a chunk read of the state before it to the cotangent of that state."""
    dtype, from_state = dnum.dtype, decays["from_state"]
    features.rotate(x, rotated)
    dread = (dnum.astype(F32) * from_state).astype(dtype)
    for block in features.blocks():
        rows = slice(block[0], block[0] + block[1])
        features.expand(block, rotated, phi)
        dstate[:, rows] += dot(dread, phi[rows], 1, 1)
    dmoments[...] += features.moments_cotangent(x, dden * from_state, dtype)


def _keys_kernel(
    q, k, v, decays, out, den, dout, dsf, dnf,
    dk, dv, dgate, ds0, dn0, dstate, dmoments, phi_q, phi_k, rotated, dkeys, dvalues, *, kernel, features, tiles,
):  # fmt: skip
    dtype, Dv, t, sub = k.dtype, v.shape[1], pl.program_id(1), tiles.pairs

    @pl.when(t == 0)
    def _():
        dstate[...] = dsf[0]
        dmoments[...] = dnf[0]

    def chunk(index):
        start = tiles.block - (index + 1) * tiles.chunk
        at = pl.ds(start, tiles.chunk)
        decay = Decays(decays[0, :, at])
        keys, values = k[0, :, at], v[0, :, at]
        transposed, keys_t, values_t = decay.rows.T, keys.T, values.T
        dkeys[...], dvalues[:Dv], dvalues[Dv : Dv + 1] = state_gradients(
            features, keys, values, decay, dstate, dmoments, phi_k, rotated.at[1]
        )
        dstate[...] = decay.carry * dstate[...]
        dmoments[...] = decay.carry * dmoments[...]

        def queries(g):
            x = q[0, g, :, at]
            dnum, dden = _cotangents(out[0, g, :, at], den[0, g, :, at], dout[0, g, :, at])
            extended = _with_remainder(dnum, dden)
            for i in range(0, tiles.chunk, sub):
                for j in range(0, i + sub, sub):
                    keys_at = slice(j, j + sub)
                    scores = dot(keys_t[keys_at], x[:, i : i + sub], 1, 0)
                    pairs = decay.pairs(transposed, i, j, sub)
                    weights = (kernel.weight(scores) * pairs).astype(dtype)
                    added = dot(extended[:, i : i + sub], weights, 1, 1)
                    dvalues[:Dv, keys_at] += added[:Dv]
                    dvalues[Dv : Dv + 1, keys_at] += added[Dv : Dv + 1] + added[Dv + 1 : Dv + 2]
                    dweights = dot(values_t[keys_at], dnum[:, i : i + sub], 1, 0) + dden[:, i : i + sub]
                    dscores = dweights * pairs * kernel.derivative(scores)
                    dkeys[:, keys_at] += dot(x[:, i : i + sub], dscores.astype(dtype), 1, 1)
            _add_queries(features, x.astype(F32), dnum, dden, decay, dstate, dmoments, phi_q, rotated.at[0])

        each(q.shape[1], queries)
        dk[0, :, at] = dkeys[...].astype(dtype)
        dv[0, :, at] = dvalues[:Dv].astype(dtype)
        ones = dvalues[Dv : Dv + 1]
        dgate[0, :, at] = -jnp.sum(values.astype(F32) * dvalues[:Dv], axis=0, keepdims=True) - ones

    each(tiles.block // tiles.chunk, chunk)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        ds0[0] = dstate[...]
        dn0[0] = dmoments[...]


def _with_remainder(dnum: Array, dden: Array) -> Array:
    """dnum with a tile of rows below: dden rounded to its dtype, what the rounding left, and zeros."""
    row = jax.lax.broadcasted_iota(jnp.int32, (2 * SUBLANES, dden.shape[1]), 0)
    high = dden.astype(dnum.dtype).astype(F32)
    tail = jnp.where(row == 0, high, jnp.where(row == 1, dden - high, 0.0))
    return jnp.concatenate([dnum, tail.astype(dnum.dtype)], axis=0)


def _specs(features: Features, tiles: Tiles, G: int, Dv: int, time):
    """Blocks of what has queries, of what has keys, and of states; `time` maps a step of the grid to its block."""
    queries = lambda rows: pl.BlockSpec((1, G, rows, tiles.block), lambda r, t: (r, 0, 0, time(t)))
    tokens = lambda rows: pl.BlockSpec((1, rows, tiles.block), lambda r, t: (r, 0, time(t)))
    D, P, M = features.head_dim, features.rows, features.moments
    states = [pl.BlockSpec((1, *shape), lambda r, t: (r, 0, 0)) for shape in ((Dv, P), (M, M))]
    inputs = [queries(D), tokens(D), tokens(Dv), tokens(SUBLANES), queries(Dv), queries(1), queries(Dv), *states]
    return inputs, queries, tokens, states


def queries_backward(
    kernel: Kernel, features: Features, tiles: Tiles, q, k, v, decays, out, den, dout, s0, n0, *, interpret=False
):
    """dq [R, G, D, T]; arguments as in `forward`, with its out and den and the cotangent of out."""
    R, G, D, T = q.shape
    Dv, P, M = v.shape[1], features.rows, features.moments
    inputs, queries, _, _ = _specs(features, tiles, G, Dv, lambda t: t)
    return pl.pallas_call(
        functools.partial(_queries_kernel, kernel=kernel, features=features, tiles=tiles),
        grid=(R, T // tiles.block),
        in_specs=inputs,
        out_specs=queries(D),
        out_shape=jax.ShapeDtypeStruct((R, G, D, T), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((Dv, P), F32),
            pltpu.VMEM((M, M), F32),
            pltpu.VMEM((P, tiles.chunk), q.dtype),
            pltpu.VMEM((2, SUBLANES, D, tiles.chunk), F32),
        ],
        compiler_params=compiler_params(),
        interpret=interpret,
        name="linear_attention_backward_queries",
    )(q, k, v, decays, out, den, dout, s0, n0)


def keys_backward(
    kernel: Kernel, features: Features, tiles: Tiles, q, k, v, decays, out, den, dout, ds, dn, *, interpret=False
):
    """(dk, dv, dgates, ds0, dn0) from the cotangents of out and of the final state.

    dgates [R, 1, T] is the gradient of the cumulative log gates, without what the final state adds at the end.
    """
    R, G, D, T = q.shape
    Dv, P, M = v.shape[1], features.rows, features.moments
    blocks = T // tiles.block
    inputs, _, tokens, states = _specs(features, tiles, G, Dv, lambda t: blocks - 1 - t)
    return pl.pallas_call(
        functools.partial(_keys_kernel, kernel=kernel, features=features, tiles=tiles),
        grid=(R, blocks),
        in_specs=inputs,
        out_specs=[tokens(D), tokens(Dv), tokens(1), *states],
        out_shape=[
            jax.ShapeDtypeStruct((R, D, T), k.dtype),
            jax.ShapeDtypeStruct((R, Dv, T), v.dtype),
            jax.ShapeDtypeStruct((R, 1, T), F32),
            jax.ShapeDtypeStruct((R, Dv, P), F32),
            jax.ShapeDtypeStruct((R, M, M), F32),
        ],
        scratch_shapes=[
            pltpu.VMEM((Dv, P), F32),
            pltpu.VMEM((M, M), F32),
            pltpu.VMEM((P, tiles.chunk), q.dtype),
            pltpu.VMEM((P, tiles.chunk), q.dtype),
            pltpu.VMEM((2, SUBLANES, D, tiles.chunk), F32),
            pltpu.VMEM((D, tiles.chunk), F32),
            pltpu.VMEM((Dv + SUBLANES, tiles.chunk), F32),
        ],
        compiler_params=compiler_params(),
        interpret=interpret,
        name="linear_attention_backward_keys",
    )(q, k, v, decays, out, den, dout, ds, dn)
