"""Linear time: dense weights inside each chunk of C tokens, a state between the chunks.

Arrays inside have features or values first and tokens last, [R, D, C], with the rows R = B K and the G queries of a
group side by side in C; the state is [R, Dv + 1, P]. So every product over features is a matrix product whose long
sides are contiguous, and the expansion works on whole vectors of tokens.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.linear_attention.columns import from_columns, to_columns
from sympow_jax.ops.linear_attention.decay import ChunkDecay, chunk_decay, gate_gradient
from sympow_jax.ops.linear_attention.inputs import LinearInputs, normalise, pad_time
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.linear_attention.rows import by_rows
from sympow_jax.ops.linear_attention.vector_gates import (
    VectorDecay,
    next_power_of_two,
    vector_decay,
    vector_gate_gradient,
)
from sympow_jax.ops.platform import target_platform
from sympow_jax.ops.residuals import kept
from sympow_jax.typing import Array, Float

KEPT_ON_GPU = 2**29  # numbers in the states that a call keeps: 2 GiB

Decay = ChunkDecay | VectorDecay


def chunked(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """Returns num / den of every row and the final state; see the package docstring for the equations."""
    B, T, K, _, _ = inputs.q.shape
    P, e = state.shape[2:]
    if inputs.has_vector_gates:
        chunk_size = next_power_of_two(chunk_size)
    chunks, segment = _plan(T, chunk_size, state.size)
    arguments = to_columns(pad_time(inputs, chunks * chunk_size), (chunks // segment, segment))
    out, final = by_rows(
        lambda tokens, state: _chunked(kernel, *tokens, state),
        arguments,
        jnp.swapaxes(state.reshape(B * K, P, e), 1, 2),
        features=P * chunk_size,
        axis=2,
    )
    out = from_columns(normalise(out, axis=-2), inputs)
    return out, jnp.swapaxes(final, 1, 2).reshape(B, K, P, e)


def _plan(T: int, chunk_size: int, state_size: int) -> tuple[int, int]:
    """How many chunks, and how many of them between two checkpoints of the state: about the square root.

    On a GPU, bound by memory traffic, all states are kept as long as they are few numbers.
    """
    chunks = -(-T // chunk_size)
    if chunks <= 16 or (target_platform() == "gpu" and chunks * state_size <= KEPT_ON_GPU):
        return chunks, 1
    root = math.isqrt(chunks)
    segment = min(range(root // 2 + 1, 2 * root), key=lambda m: (-chunks % m, abs(m - root)))
    return chunks + -chunks % segment, segment


def _tile(decay: Array, G: int) -> Array:
    """[R, C] -> [R, 1, G C]: the decay of a token is that of all queries of its group."""
    return jnp.tile(decay, (1, G))[:, None]


def _store(phi: Array, inputs: Any) -> Array:
    """Features, or their cotangents, as memory holds them: on a GPU in bfloat16 if the inputs are, half the bytes.

    Products take them in the dtype of the sums again. All values and the normaliser read the same rounded features,
    and cotangents are rounded after theirs have cancelled.
    """
    if target_platform() != "gpu" or inputs != jnp.bfloat16:
        return phi
    return jax.lax.optimization_barrier(phi.astype(jnp.bfloat16)).astype(phi.dtype)  # or XLA keeps the float32


def _decay(log_gates: Array, runs: Array) -> Decay:
    """The decays of all chunks, of gates of a head or of its dims."""
    return chunk_decay(log_gates, runs) if log_gates.ndim == runs.ndim else vector_decay(log_gates, runs)


def _update(kernel: Kernel, inputs: Any, state: Array, k: Array, values: Array, decay: Decay) -> Array:
    """The state after a chunk: the state before it, decayed, plus the chunk's keys."""
    features = _store(kernel.features(decay.of_keys(k)), inputs)
    return decay.carry(kernel) * state + jnp.einsum("rec,rpc->rep", values * decay.to_state[:, None], features)


def _pairs(q: Array, k: Array, decay: Decay) -> Array:
    """Decays of the weights inside a chunk, [R, key, G query]."""
    return jnp.tile(decay.of_pairs(), (1, 1, q.shape[2] // k.shape[2]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(kernel: Kernel, tokens: tuple[Array, Array, Array], log_gates: Array, runs: Array, state: Array):
    return _forward(kernel, tokens, log_gates, runs, state)[0]


def _forward(kernel: Kernel, tokens: tuple[Array, Array, Array], log_gates: Array, runs: Array, state: Array):
    dtype, inputs = log_gates.dtype, tokens[1].dtype

    def chunk(state, xs):
        q, k, values, decay = _cast(xs, dtype)
        weights = kernel.weight(decay.scores(q, k)) * _pairs(q, k, decay)
        out = jnp.einsum("rej,rji->rei", values, weights)
        read = jnp.einsum("rep,rpi->rei", state, _store(kernel.features(decay.of_queries(q)), inputs))
        out += read * _tile(decay.from_state, q.shape[2] // k.shape[2])
        return _update(kernel, inputs, state, k, values, decay), out

    def one_segment(before, xs):
        after, out = jax.lax.scan(_unless_padding(kernel, chunk), before, xs)
        return after, (out, before)

    xs = (*tokens, _decay(log_gates, runs))
    final, (out, checkpoints) = jax.lax.scan(one_segment, state, xs)
    final, out = kept((final, out))
    if target_platform() != "gpu":  # its many states would travel through memory; adding keys up again does less
        checkpoints = kept(checkpoints)
    return (out, final), (tokens, log_gates, runs, out, checkpoints, final)


def _backward(kernel: Kernel, residuals, cotangents):
    tokens, log_gates, runs, out, checkpoints, final = residuals
    dout, dfinal = cotangents
    dtype, inputs = log_gates.dtype, tokens[1].dtype

    def advance(state, xs):
        _, k, values, decay = _cast(xs, dtype)
        return _update(kernel, inputs, state, k, values, decay), state

    def chunk(dstate, xs, out, dout, state):
        q, k, values, decay = _cast(xs, dtype)
        G = q.shape[2] // k.shape[2]
        # what the queries read of the state before the chunk
        dread = dout * _tile(decay.from_state, G)
        features, features_vjp = jax.vjp(lambda q: kernel.features(decay.of_queries(q)), q)
        (dq,) = features_vjp(_store(jnp.einsum("rep,rei->rpi", state, dread), inputs))
        dbefore = decay.carry(kernel) * dstate
        dbefore += jnp.einsum("rei,rpi->rep", dread, _store(features, inputs))
        # what the keys add to the state after the chunk
        features, features_vjp = jax.vjp(lambda k: kernel.features(decay.of_keys(k)), k)
        dfeatures = jnp.einsum("rep,rej->rpj", dstate, values * decay.to_state[:, None])
        (dk,) = features_vjp(_store(dfeatures, inputs))
        dvalues = jnp.einsum("rep,rpj->rej", dstate, _store(features, inputs)) * decay.to_state[:, None]
        # the pairs inside the chunk
        (scores, scores_vjp), decays = jax.vjp(decay.scores, q, k), _pairs(q, k, decay)
        dvalues += jnp.einsum("rei,rji->rej", dout, kernel.weight(scores) * decays)
        dscores = jnp.einsum("rej,rei->rji", values, dout) * decays * kernel.derivative(scores)
        dq, dk = (x + dx for x, dx in zip((dq, dk), scores_vjp(dscores), strict=True))

        if isinstance(decay, VectorDecay):  # gates scale queries and keys
            dcumulative = jnp.sum((q * dq).reshape(*k.shape[:2], G, -1), axis=2) - k * dk
        else:
            dcumulative = jnp.sum((out * dout).reshape(*values.shape[:2], G, -1), axis=(1, 2))
            dcumulative -= jnp.sum(values * dvalues, axis=1)
        dtokens = tuple(d.astype(x.dtype) for d, x in zip((dq, dk, dvalues), xs, strict=False))
        return dbefore, (dtokens, dcumulative)

    def one_segment(dstate, xs):
        tokens, out, dout, checkpoint = xs
        _, states = jax.lax.scan(_unless_padding(kernel, advance), checkpoint, tokens)
        return jax.lax.scan(_unless_padding(kernel, chunk), dstate, (tokens, out, dout, states), reverse=True)

    xs = ((*tokens, _decay(log_gates, runs)), out, dout, checkpoints)
    dstate, (dtokens, dcumulative) = jax.lax.scan(one_segment, dfinal, xs, reverse=True)
    if log_gates.ndim == runs.ndim:
        dgates = gate_gradient(dcumulative, jnp.sum(final * dfinal, axis=(1, 2)), runs)
    else:
        dgates = vector_gate_gradient(kernel, dcumulative, jnp.sum(final * dfinal, axis=1), runs)
    return dtokens, dgates, np.zeros(runs.shape, jax.dtypes.float0), dstate


def _unless_padding(kernel: Kernel, chunk):
    """A scan body that skips chunks of padding.

    The branch is also what makes XLA materialise the slices of a chunk, instead of fusing them into the expansion,
    whose loop then is not vectorised. A GPU would wait for the host at each branch: it has none.
    """

    def body(state, xs):
        tokens, *rest = xs if isinstance(xs[0], tuple) else (xs,)
        if target_platform() == "gpu":
            return chunk(state, tokens, *rest)
        values, decay = tokens[2:]
        skipped = jax.eval_shape(chunk, state, tokens, *rest)[1]

        def skip(state, *_):
            return decay.carry(kernel) * state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), skipped)

        return jax.lax.cond(jnp.any(values[:, -1] != 0), chunk, skip, state, tokens, *rest)

    return body


def _cast(xs, dtype) -> tuple[Array, Array, Array, Decay]:
    q, k, values, decay = xs
    return q.astype(dtype), k.astype(dtype), values.astype(dtype), decay


_chunked.defvjp(_forward, _backward)
