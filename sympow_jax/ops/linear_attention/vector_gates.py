"""Gates of every dim: score_ij = sum_d q_id k_jd exp(g_(j+1)d + ... + g_id), and no exponent above 0.

Two blocks of c tokens side by side make one of 2c. What a query of the right block sees of a key of the left one is
split at their border: exp(sum of the gates from the border to the query) is the query's, exp(sum from the key to the
border) the key's, and their scores are one product. From single tokens up to the chunk every pair is split once, at the
border of the smallest block that holds both. All sums are of numbers of one sign, so nothing cancels in them: a block's
are those of its halves plus the total of the other half. Secondary chunks after GLA (arXiv 2312.06635), as a tree.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.decay import causal_runs, gate_gradient, reach
from sympow_jax.ops.linear_attention.kernels import Kernel, state_decay
from sympow_jax.typing import Array, Float, Int


def pair_scores(
    q: Float[Array, "R D GC"], k: Float[Array, "R D C"], log_gates: Float[Array, "R D C"]
) -> Float[Array, "R C GC"]:
    """The scores of key j (rows) and query i >= j (columns) of a chunk, C a power of two; 0 where i < j."""
    R, D, C = k.shape
    q = q.reshape(R, D, -1, C)
    scores = jnp.einsum("rdi,rdgi->rgi", k, q)[..., None, None]  # [R, G, blocks, key, query]
    for to_query, from_key in _blocks(log_gates):
        left, _ = _halves(k.reshape(from_key.shape) * jnp.exp(from_key))
        _, right = _halves(q.reshape(*q.shape[:3], *to_query.shape[2:]) * jnp.exp(to_query)[:, :, None])
        across = jnp.einsum("rdnj,rdgni->rgnji", left, right)
        pairs = scores.reshape(*across.shape[:3], 2, *across.shape[3:])
        earlier, later = pairs[:, :, :, 0], pairs[:, :, :, 1]
        rows = [earlier, across], [jnp.zeros_like(across), later]
        scores = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
    return jnp.swapaxes(scores[:, :, 0], 1, 2).reshape(R, C, -1)


def _blocks(log_gates: Float[Array, "R D C"]) -> Iterator[tuple[Array, Array]]:
    """Of blocks of 1, 2, 4, .. C/2 tokens, [R, D, blocks, tokens]: sums to each token, and from after it to the end."""
    to, after = log_gates[..., None], jnp.zeros_like(log_gates)[..., None]
    while to.shape[2] > 1:
        yield to, after
        total = to[..., -1:]
        (left, right), (left_after, right_after), (left_total, right_total) = map(_halves, (to, after, total))
        to = jnp.concatenate([left, left_total + right], axis=-1)
        after = jnp.concatenate([left_after + right_total, right_after], axis=-1)


def _halves(x: Float[Array, "*R N C"]) -> tuple[Array, Array]:
    """The left and the right one of every two blocks."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])
    return pairs[..., 0, :], pairs[..., 1, :]


def next_power_of_two(length: int) -> int:
    """The shortest chunk of at least `length` tokens that halves down to single ones."""
    return 1 << (length - 1).bit_length()


def to_each(log_gates: Float[Array, "*R C"]) -> Float[Array, "*R C"]:
    """The sums of the log gates up to each token."""
    return jnp.cumsum(log_gates, axis=-1)


def after_each(log_gates: Float[Array, "*R C"]) -> Float[Array, "*R C"]:
    """The sums of the log gates after each token."""
    sums = jnp.flip(jnp.cumsum(jnp.flip(log_gates[..., 1:], -1), -1), -1)
    return jnp.concatenate([sums, jnp.zeros_like(log_gates[..., :1])], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VectorDecay:
    """`ChunkDecay` of gates of every dim: queries and keys decay, and what is left for the values are documents.

    `from_state` and `to_state` are 1 or 0: whether a token sees the state before its chunk, and is seen by that after.
    """

    log_gates: Float[Array, "*N R D C"]
    runs: Int[Array, "*N R C"]
    from_state: Float[Array, "*N R C"]
    to_state: Float[Array, "*N R C"]

    def carry(self, kernel: Kernel) -> Float[Array, "R 1 P"]:
        """What is left of a state after the chunk."""
        left = state_decay(kernel, jnp.exp(jnp.sum(self.log_gates, axis=-1))[None])[0]
        return self.from_state[:, None, -1:] * jnp.swapaxes(left, 1, 2)

    def of_queries(self, q: Float[Array, "R D GC"]) -> Float[Array, "R D GC"]:
        """Queries as they read the state before the chunk."""
        return q * jnp.tile(jnp.exp(to_each(self.log_gates)), (1, 1, q.shape[2] // self.runs.shape[1]))

    def of_keys(self, k: Float[Array, "R D C"]) -> Float[Array, "R D C"]:
        """Keys as the state after the chunk holds them."""
        return k * jnp.exp(after_each(self.log_gates))

    def scores(self, q: Float[Array, "R D GC"], k: Float[Array, "R D C"]) -> Float[Array, "R C GC"]:
        """Decayed scores of the pairs inside the chunk."""
        return pair_scores(q, k, self.log_gates)

    def of_pairs(self) -> Float[Array, "R C C"]:
        """1 for key j (rows) and query i (columns) where i sees j, else 0."""
        return causal_runs(self.runs).astype(self.log_gates.dtype)


def vector_decay(log_gates: Float[Array, "*N R D C"], runs: Int[Array, "*N R C"]) -> VectorDecay:
    """What tokens read of the state before their chunk and leave to the state after it: nothing across a new run."""
    from_state, to_state = (x.astype(log_gates.dtype) for x in reach(runs))
    return VectorDecay(log_gates, runs, from_state, to_state)


def vector_gate_gradient(
    kernel: Kernel, dcumulative: Float[Array, "*N R D C"], at_end: Float[Array, "R P"], runs: Int[Array, "*N R C"]
) -> Float[Array, "*N R D C"]:
    """From gradients of the sums of the log gates, q dq - k dk, to those of the log gates.

    `at_end` is the final state times its gradient, feature by feature, which decay as monomials of the gates.
    """
    *N, R, D, C = dcumulative.shape
    zeros = jnp.zeros((1, R, D), at_end.dtype)
    at_end = jax.grad(lambda g: jnp.sum(state_decay(kernel, jnp.exp(g))[0, ..., 0] * at_end))(zeros)
    rows = jnp.broadcast_to(runs[..., None, :], dcumulative.shape)
    flat = (x.reshape(*N, R * D, C) for x in (dcumulative, rows))
    return gate_gradient(next(flat), at_end.reshape(-1), next(flat)).reshape(dcumulative.shape)
