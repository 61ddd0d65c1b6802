"""The state that tokens leave behind, for a shard whose outputs come later: keys alone, and their gradients."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.pallas_tpu.backward import state_gradients
from sympow_jax.ops.linear_attention.pallas_tpu.features import Features
from sympow_jax.ops.linear_attention.pallas_tpu.forward import add_keys
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import SUBLANES, Decays, Steps, Tiles, call

F32 = jnp.float32


def _kernel(k, v, decays, s, n, state, moments, *, features, tiles):
    @pl.when(pl.program_id(1) == 0)
    def _():
        state[...] = jnp.zeros_like(state)
        moments[...] = jnp.zeros_like(moments)

    for start in range(0, tiles.block, tiles.chunk):
        at = slice(start, start + tiles.chunk)
        add_keys(features, k[0, :, at], v[0, :, at], Decays(decays[0, :, at]), state, moments)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        s[0] = state[...]
        n[0] = moments[...]


def _backward_kernel(k, v, decays, dsf, dnf, dk, dv, dgate, dstate, dmoments, *, features, tiles):
    @pl.when(pl.program_id(1) == 0)
    def _():
        dstate[...] = dsf[0]
        dmoments[...] = dnf[0]

    for start in reversed(range(0, tiles.block, tiles.chunk)):
        at = slice(start, start + tiles.chunk)
        decay = Decays(decays[0, :, at])
        gradients = state_gradients(features, k[0, :, at], v[0, :, at], decay, dstate, dmoments)
        dk[0, :, at] = gradients[0].astype(dk.dtype)
        dv[0, :, at] = gradients[1].astype(dv.dtype)
        dgate[0, :, at] = -gradients[2]
        dstate[...] = decay.carry * dstate[...]
        dmoments[...] = decay.carry * dmoments[...]


def final_state(features: Features, tiles: Tiles, tokens, decays):
    """The state [R, Dv, P] and the moments [R, M, M] after the last token, from nothing; arguments as in `forward`."""
    k, v = tokens
    (R, D, T), Dv, P, M = k.shape, v.shape[1], features.rows, features.moments
    steps = Steps(tiles.block, T // tiles.block)
    block, states = steps.of_tokens, [steps.of_states(Dv, P), steps.of_states(M, M)]
    return call(
        "state",
        functools.partial(_kernel, features=features, tiles=tiles),
        steps,
        (*tokens, decays),
        blocks=[block(D), block(Dv), block(SUBLANES)],
        out=[((R, Dv, P), F32, states[0]), ((R, M, M), F32, states[1])],
        scratch=[(Dv, P), (M, M)],
        macs=P * Dv + M * M,
    )


def final_state_backward(features: Features, tiles: Tiles, tokens, decays, dafter):
    """(dk, dv, gradient of the cumulative log gates [R, 1, T]) from the cotangents of `final_state`."""
    k, v = tokens
    (R, D, T), Dv, P, M = k.shape, v.shape[1], features.rows, features.moments
    steps = Steps(tiles.block, T // tiles.block, backwards=True)
    block, states = steps.of_tokens, [steps.of_states(Dv, P), steps.of_states(M, M)]
    return call(
        "state_backward",
        functools.partial(_backward_kernel, features=features, tiles=tiles),
        steps,
        (*tokens, decays, *dafter),
        blocks=[block(D), block(Dv), block(SUBLANES), *states],
        out=[((R, D, T), k.dtype, block(D)), ((R, Dv, T), v.dtype, block(Dv)), ((R, 1, T), F32, block(1))],
        scratch=[(Dv, P), (M, M)],
        macs=2 * P * Dv + M * M,
    )
