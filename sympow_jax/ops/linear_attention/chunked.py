"""Linear time: dense weights inside each chunk of C tokens, a state between the chunks.

Arrays inside have features or values first and tokens last, [R, D, C], with the rows R = B K and the G queries of a
group side by side in C; the state is [R, Dv + 1, P]. So every product over features is a matrix product whose long
sides are contiguous, and the expansion works on whole vectors of tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.decay import ChunkDecay, chunk_decay, gate_gradient, pair_decay
from sympow_jax.ops.linear_attention.inputs import LinearInputs, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import Array, Float, accumulation_dtype


def chunked(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv+1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv+1"], Float[Array, "B K P Dv+1"]]:
    """Returns [num, den] of every row and the final state; see the package docstring for the equations."""
    B, T, K, G, _ = inputs.q.shape
    P, e = state.shape[2:]
    chunks, segment = _plan(T, chunk_size)
    inputs = pad_time(inputs, chunks * chunk_size)
    out, final = _chunked(kernel, chunk_size, segment, inputs, jnp.swapaxes(state.reshape(B * K, P, e), 1, 2))
    out = out.reshape(chunks, B, K, e, G, chunk_size)
    out = jnp.transpose(out, (1, 0, 5, 2, 4, 3)).reshape(B, -1, K, G, e)[:, :T]
    return out, jnp.swapaxes(final, 1, 2).reshape(B, K, P, e)


def _plan(T: int, chunk_size: int) -> tuple[int, int]:
    """How many chunks, and how many of them between two checkpoints of the state: about the square root."""
    chunks = -(-T // chunk_size)
    if chunks <= 16:
        return chunks, 1
    root = math.isqrt(chunks)
    segment = min(range(root // 2 + 1, 2 * root), key=lambda m: (-chunks % m, abs(m - root)))
    return chunks + -chunks % segment, segment


def _split(inputs: LinearInputs, chunk_size: int, segment: int):
    """The chunks of a padded input, stacked [segments, chunks in a segment, ...]."""
    decay = chunk_decay(inputs.log_gates, inputs.runs, chunk_size)

    def split(x):
        x = x.reshape(x.shape[0], -1, segment, chunk_size, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    tokens = [split(x) for x in (inputs.q, inputs.k, inputs.v, inputs.valid)]
    return tokens, jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), decay)


def _columns(tokens, dtype) -> tuple[Array, Array, Array]:
    """One chunk as q [R, D, G C], k [R, D, C] and the extended values [v, 1] [R, Dv + 1, C], 0 for padding."""
    q, k, v, valid = tokens
    B, C, K, G, D = q.shape
    q = jnp.transpose(q, (0, 2, 4, 3, 1)).reshape(B * K, D, G * C)
    k, v = (jnp.transpose(x, (0, 2, 3, 1)).reshape(B * K, -1, C) for x in (k, v))
    mask = jnp.repeat(valid, K, axis=0)[:, None]
    values = jnp.concatenate([jnp.where(mask, v, jnp.zeros((), v.dtype)), mask.astype(v.dtype)], axis=1)
    return q.astype(dtype), k.astype(dtype), values.astype(dtype)


def _rows(x: Array, shape: tuple[int, ...]) -> Array:
    """[R, D, G C] back to [B, C, K, G, D], or [R, D, C] to [B, C, K, D]."""
    B, C, K, *G, D = shape
    order = (0, 4, 1, 3, 2) if G else (0, 3, 1, 2)
    return jnp.transpose(x.reshape(B, K, D, *G, C), order)


def _tile(decay: Array, G: int) -> Array:
    """[R, C] -> [R, 1, G C]: the decay of a token is that of all queries of its group."""
    return jnp.tile(decay, (1, G))[:, None]


def _update(kernel: Kernel, state: Array, k: Array, values: Array, decay: ChunkDecay) -> Array:
    """The state after a chunk: the state before it, decayed, plus the chunk's keys."""
    added = jnp.einsum("rec,rpc->rep", values * decay.to_state[:, None], kernel.features(k))
    return decay.carry[:, None, None] * state + added


def _weights(kernel: Kernel, q: Array, k: Array, decay: ChunkDecay) -> tuple[Array, Array, Array]:
    """Scores and decays of the pairs inside a chunk, [R, key, G query] and [R, key, query] repeated for G."""
    scores = jnp.einsum("rdj,rdi->rji", k, q)
    return scores, jnp.tile(pair_decay(decay), (1, 1, q.shape[2] // k.shape[2])), kernel.weight(scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(kernel: Kernel, chunk_size: int, segment: int, inputs: LinearInputs, state: Array):
    return _forward(kernel, chunk_size, segment, inputs, state)[0]


def _forward(kernel: Kernel, chunk_size: int, segment: int, inputs: LinearInputs, state: Array):
    dtype, G = accumulation_dtype(inputs.q, inputs.k, inputs.v), inputs.q.shape[3]

    def chunk(state, xs):
        tokens, decay = xs
        q, k, values = _columns(tokens, dtype)
        _, pairs, weights = _weights(kernel, q, k, decay)
        out = jnp.einsum("rej,rji->rei", values, weights * pairs)
        out += jnp.einsum("rep,rpi->rei", state, kernel.features(q)) * _tile(decay.from_state, G)
        return _update(kernel, state, k, values, decay), out

    def one_segment(state, xs):
        final, out = jax.lax.scan(chunk, state, xs)
        return final, (out, state)

    final, (out, checkpoints) = jax.lax.scan(one_segment, state, _split(inputs, chunk_size, segment))
    return (out, final), (inputs, out, checkpoints, final)


def _backward(kernel: Kernel, chunk_size: int, segment: int, residuals, cotangents):
    inputs, out, checkpoints, final = residuals
    dout, dfinal = cotangents
    dtype, G = accumulation_dtype(inputs.q, inputs.k, inputs.v), inputs.q.shape[3]

    def advance(state, xs):
        tokens, decay = xs
        _, k, values = _columns(tokens, dtype)
        return _update(kernel, state, k, values, decay), state

    def chunk(dstate, xs):
        (tokens, decay), out, dout, state = xs
        q, k, values = _columns(tokens, dtype)
        read = dout * _tile(decay.from_state, G)
        features, features_vjp = jax.vjp(kernel.features, q)
        (dq,) = features_vjp(jnp.einsum("rep,rei->rpi", state, read))
        dstate_before = decay.carry[:, None, None] * dstate + jnp.einsum("rei,rpi->rep", read, features)

        written = values * decay.to_state[:, None]
        features, features_vjp = jax.vjp(kernel.features, k)
        (dk,) = features_vjp(jnp.einsum("rep,rej->rpj", dstate, written))
        dvalues = jnp.einsum("rep,rpj->rej", dstate, features) * decay.to_state[:, None]

        scores, pairs, weights = _weights(kernel, q, k, decay)
        dvalues += jnp.einsum("rei,rji->rej", dout, weights * pairs)
        dscores = jnp.einsum("rej,rei->rji", values, dout) * pairs * kernel.derivative(scores)
        dq += jnp.einsum("rdj,rji->rdi", k, dscores)
        dk += jnp.einsum("rdi,rji->rdj", q, dscores)

        rows = jnp.sum(out * dout, axis=1).reshape(-1, G, k.shape[2]).sum(axis=1)
        dcumulative = rows - jnp.sum(values * dvalues, axis=1)
        q_, k_, v_, _ = tokens
        dtokens = _rows(dq, q_.shape), _rows(dk, k_.shape), _rows(dvalues[:, :-1], v_.shape)
        return dstate_before, ([d.astype(x.dtype) for d, x in zip(dtokens, tokens)], dcumulative)

    def one_segment(dstate, xs):
        split, out, dout, checkpoint = xs
        if segment == 1:
            states = checkpoint[None]
        else:
            _, states = jax.lax.scan(advance, checkpoint, split)
        return jax.lax.scan(chunk, dstate, (split, out, dout, states), reverse=True)

    split = _split(inputs, chunk_size, segment)
    dstate, (dtokens, dcumulative) = jax.lax.scan(one_segment, dfinal, (split, out, dout, checkpoints), reverse=True)
    B, T, K = inputs.log_gates.shape

    def join(x):
        return jnp.moveaxis(x, 2, 0).reshape(B, T, *x.shape[4:])

    dq, dk, dv = (join(x) for x in dtokens)
    dcumulative = jnp.moveaxis(dcumulative.reshape(-1, B, K, chunk_size), 0, 2).reshape(B, K, T)
    at_end = jnp.sum(final * dfinal, axis=(1, 2)).reshape(B, K)
    dgates = gate_gradient(dcumulative, at_end, inputs.runs)
    dinputs = LinearInputs(dq, dk, dv, dgates, _no_gradient(inputs.runs), _no_gradient(inputs.valid))
    return dinputs, dstate


def _no_gradient(x: Array):
    import numpy as np

    return np.zeros(x.shape, jax.dtypes.float0)


_chunked.defvjp(_forward, _backward)
