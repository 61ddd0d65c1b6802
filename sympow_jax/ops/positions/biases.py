"""The formulas of the additive position biases.

Distances are query position minus key position, >= 0 for visible pairs. Every formula stays finite for negative
ones, where the attention masks it, because a masked NaN still poisons gradients.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.positions.rotary import phase_turns
from sympow_jax.typing import Array, Float, Int, accumulation_dtype


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi slopes m_h [H], float64: the bias is -m_h * distance (arXiv 2108.12409).

    m_h = 2^(-8h/n) for a power of two n; other head counts append every second slope of 2n, as published.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: legal are integers >= 1")
    n = 2 ** int(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    extra = 2.0 ** (-8.0 * np.arange(1, 2 * n + 1, 2) / (2 * n))
    return np.concatenate([slopes, extra[: num_heads - n]])


def t5_bucket(distance: Int[Array, "..."], *, num_buckets: int = 32, max_distance: int = 128) -> Int[Array, "..."]:
    """T5's causal buckets: exact below num_buckets / 2, then logarithmic, the last for everything further."""
    exact = num_buckets // 2
    # Starts of the logarithmic buckets, in exact integer arithmetic on the host: the comparison cannot round.
    grid = np.arange(exact, max_distance + 1)
    buckets = exact + np.floor(np.log(grid / exact) / np.log(max_distance / exact) * (num_buckets - exact) + 1e-9)
    starts = [int(grid[np.argmax(buckets >= b)]) for b in range(exact + 1, num_buckets)]
    distance = jnp.maximum(distance, 0)
    bucket = jnp.minimum(distance, exact)
    for start in starts:
        bucket = bucket + (distance >= start).astype(distance.dtype)
    return bucket


def fire_input(
    query_position: Int[Array, "..."],
    distance: Int[Array, "..."],
    *,
    c: Float[Array, ""] | float = 0.1,
    threshold: Float[Array, ""] | float = 512.0,
    eps: float = 1e-6,
) -> Float[Array, "..."]:
    """The input of FIRE's MLP, psi(distance) / (psi(max(query_position, threshold)) + eps), psi(x) = ln(|c x| + 1).

    query_position and distance broadcast by size (same rank); arXiv 2310.04418, appendix listing.
    """
    dtype = accumulation_dtype(*(a for a in (c, threshold) if isinstance(a, jax.Array)))
    c, threshold = jnp.asarray(c, dtype), jnp.asarray(threshold, dtype)
    normalizer = jnp.log1p(jnp.abs(c * jnp.maximum(query_position.astype(dtype), threshold)))
    return jnp.log1p(jnp.abs(c * distance.astype(dtype))) / (normalizer + eps)


def kerple_log(distance: Int[Array, "..."], *, p: Float[Array, "H"], a: Float[Array, "H"]) -> Float[Array, "H ..."]:
    """Kerple's logarithmic kernel, -p ln(1 + a * distance) (arXiv 2205.09921)."""
    d, (p, a) = _per_head(distance, p, a)
    return -p * jnp.log1p(a * d)


def kerple_power(distance: Int[Array, "..."], *, a: Float[Array, "H"], p: Float[Array, "H"]) -> Float[Array, "H ..."]:
    """Kerple's power kernel, -a * distance^p, 0 < p <= 2 (arXiv 2205.09921)."""
    d, (a, p) = _per_head(distance, a, p)
    positive = d > 0
    return jnp.where(positive, -a * jnp.exp(p * jnp.log(jnp.where(positive, d, 1.0))), 0.0)


def sandwich(distance: Int[Array, "..."], num_heads: int, *, dim: int = 128) -> Float[Array, "H ..."]:
    """Sandwich, [sum_k=1..dim/2 cos(d / 10000^(2k/dim)) - dim/2] / (8 h / H), h = 1..H (arXiv 2212.10356)."""
    turns = phase_turns(distance, sandwich_frequencies(dim))
    total = jnp.sum(jnp.cos(turns * np.float32(2 * np.pi)) - 1.0, -1)
    return sandwich_strengths(num_heads).reshape(num_heads, *[1] * distance.ndim) * total[None]


def sandwich_frequencies(dim: int) -> np.ndarray:
    """Radians per token [dim/2]: 10000^(-2k/dim), k = 1..dim/2."""
    return 10000.0 ** (-2.0 * np.arange(1, dim // 2 + 1) / dim)


def sandwich_strengths(num_heads: int) -> Float[Array, "H"]:
    """Factor of each head [H]: H / (8 h), h = 1..H."""
    return jnp.asarray(num_heads / (8.0 * np.arange(1, num_heads + 1)), jnp.float32)


def _per_head(distance, *parameters):
    shape = (parameters[0].shape[0], *[1] * distance.ndim)
    return jnp.maximum(distance, 0).astype(parameters[0].dtype)[None], [x.reshape(shape) for x in parameters]
