"""What the fused kernels of TPUs and GPUs share: products, the decays of rows, and what planners are told."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from sympow_jax.ops.linear_attention.decay import chunk_decay, gate_gradient
from sympow_jax.ops.linear_attention.inputs import LinearInputs
from sympow_jax.typing import Array, Bool, Float, Int

ROWS = ("whole", "rest", "runs", "from_state", "to_state", "carry")  # of the decays
DECAYS = 8  # rows of the decays, two of them unused: a tile of a TPU

Decays = tuple[Float[Array, "R T"], Int[Array, "R T"], Bool[Array, "R T"]]  # log gates, runs, valid


def dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """The product of two matrices over one axis of each; float32 is exact, bfloat16 adds up in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def inverse(den: Array) -> Array:
    """1 / den, 0 where den is 0."""
    present = den != 0.0
    return jnp.where(present, 1.0 / jnp.where(present, den, 1.0), 0.0)


def cost(multiply_adds: int, arrays: Any) -> pl.CostEstimate:
    """What the planner is told of a kernel: its products, and that each argument and result moves once."""
    traffic = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * multiply_adds, transcendentals=0, bytes_accessed=traffic)


def rows_of_decays(inputs: LinearInputs) -> Decays:
    """The log gates, runs and valid tokens of each row."""
    B, T, K = inputs.log_gates.shape
    gates = jnp.moveaxis(inputs.log_gates, 1, 2).reshape(B * K, T)
    return gates, jnp.repeat(inputs.runs, K, axis=0), jnp.repeat(inputs.valid, K, axis=0)


def decay_rows(decays: Decays, chunk: int) -> Float[Array, "R 8 T"]:
    """The decays of every chunk, one row each (`ROWS`), float32; padding leaves nothing to the state."""
    log_gates, runs, valid = decays
    R, T = log_gates.shape
    decay = chunk_decay(in_chunks(log_gates, chunk), in_chunks(runs, chunk))
    to_state = jnp.where(in_chunks(valid, chunk), decay.to_state, 0.0)
    carry = jnp.broadcast_to(decay.from_state[..., -1:], to_state.shape)
    rows = [decay.whole, decay.rest, decay.runs.astype(jnp.float32), decay.from_state, to_state, carry]
    rows += [jnp.zeros_like(carry)] * (DECAYS - len(rows))
    return jnp.stack([jnp.moveaxis(x[0], 0, 1).reshape(R, T) for x in rows], axis=1)


def in_chunks(x: Array, chunk: int) -> Array:
    """[R, T] -> [1, N, R, C], as `decay.py` takes it."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk), 1, 0)[None]


def gradients_of_decays(dcumulative: Float[Array, "R T"], at_end: Float[Array, " R"], decays: Decays, chunk: int):
    """Of the log gates, from that of their sums and what the final state adds at the end; the rest has none."""
    _, runs, valid = decays
    dgates = gate_gradient(in_chunks(dcumulative, chunk), at_end, in_chunks(runs, chunk))
    zeros = (np.zeros(x.shape, jax.dtypes.float0) for x in (runs, valid))
    return jnp.moveaxis(dgates[0], 0, 1).reshape(runs.shape), *zeros


def inner_product(a: tuple[Array, ...], b: tuple[Array, ...]) -> Float[Array, " R"]:
    """Of states with their normalisers, row by row."""
    return jnp.sum(jnp.stack([jnp.sum(x * y, axis=tuple(range(1, x.ndim))) for x, y in zip(a, b, strict=True)]), axis=0)


def rows_in_padded(head_dim: int, padded: int, first: int = 0) -> np.ndarray:
    """Where each degree-2 feature of head_dim is among those of the even `padded`, which start at row `first`."""
    row = {}
    for r in range(padded // 2 + 1):
        for i in range(padded if r < padded // 2 else padded // 2):
            row[frozenset((i, (i + r) % padded))] = first + r * padded + i
    pairs = [(i, (i + r) % head_dim) for r in range(head_dim // 2 + 1) for i in range(head_dim)]
    return np.asarray([row[frozenset(pair)] for pair in pairs[: head_dim * (head_dim + 1) // 2]])
