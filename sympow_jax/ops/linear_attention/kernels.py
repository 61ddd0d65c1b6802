"""Kernels and their feature expansions: phi(q) . phi(k) = kernel(q . k), exactly and without gathers."""

import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, Float

SQRT2 = math.sqrt(2.0)


@runtime_checkable
class Kernel(Protocol):
    """What a linear kernel is: a weight of scores, >= 0, and features with phi(q) . phi(k) = weight(q . k).

    Every form of linear attention, its gradients and its states follow from these four functions. Kernels are frozen
    dataclasses: they are static arguments of compiled programs.
    """

    def weight(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The kernel as a function of the score s = q . k."""
        ...

    def derivative(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The derivative of `weight`."""
        ...

    def features(self, x: Float[Array, "*B D C"]) -> Float[Array, "*B P C"]:
        """phi(x) of C tokens."""
        ...

    def num_features(self, head_dim: int) -> int:
        """P, the size of phi."""
        ...


@dataclasses.dataclass(frozen=True)
class PowerKernel:
    """kernel(s) = s^p for an even degree p: symmetric power attention."""

    degree: int

    def __post_init__(self) -> None:
        if self.degree < 2 or self.degree % 2:
            raise ValueError(f"degree={self.degree} must be even (weights must not be negative): 2, 4 or 6")

    def weight(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The kernel as a function of the score s = q . k."""
        return _integer_power(s, self.degree)

    def derivative(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The derivative of `weight`."""
        return self.degree * s * (1.0 if self.degree == 2 else _integer_power(s, self.degree - 2))

    def features(self, x: Float[Array, "*B D C"]) -> Float[Array, "*B P C"]:
        """phi(x) of C tokens, P = C(D + p - 1, p) numbers: every monomial of degree p once."""
        return _squares(x) if self.degree == 2 else _monomials(x, self.degree)

    def num_features(self, head_dim: int) -> int:
        """P, the size of phi: the exact dimension of symmetric tensors."""
        return math.comb(head_dim + self.degree - 1, self.degree)


@dataclasses.dataclass(frozen=True)
class TaylorKernel:
    """kernel(s) = 1 + s + s^2 / 2: the second-order Taylor expansion of exp, Based's kernel (arXiv 2402.18668)."""

    def weight(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The kernel as a function of the score s = q . k."""
        return 1.0 + s + 0.5 * s * s

    def derivative(self, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The derivative of `weight`."""
        return 1.0 + s

    def features(self, x: Float[Array, "*B D C"]) -> Float[Array, "*B P C"]:
        """phi(x) = [1, x, phi_2(x) / sqrt(2)], P = 1 + D + D (D + 1) / 2 numbers."""
        return jnp.concatenate([jnp.ones_like(x[..., :1, :]), x, _squares(x / SQRT2**0.5)], axis=-2)

    def num_features(self, head_dim: int) -> int:
        """P, the size of phi."""
        return 1 + head_dim + head_dim * (head_dim + 1) // 2


def state_decay(kernel: Kernel, gates: Float[Array, "B K *D"]) -> Float[Array, "B K P 1"]:
    """What gates, one a head [B, K] or one a head and dim [B, K, D], leave of a state [B, K, P, Dv].

    Those of the dims decay a feature by its monomial of them, phi(gates x) = (phi(gates) / phi(1)) phi(x): for a power
    by products of p gates, for Taylor's kernel by products of 0, 1 and 2.
    """
    if gates.ndim == 2:
        return gates[..., None, None]
    of_ones = kernel.features(jnp.ones((1,) * (gates.ndim - 1) + (gates.shape[-1], 1), gates.dtype))
    return kernel.features(gates[..., None]) / of_ones


def _integer_power(s: Array, degree: int) -> Array:
    """s^degree by repeated squaring, for an even degree."""
    half = (
        s
        if degree == 2
        else _integer_power(s, degree // 2)
        if degree % 4 == 0
        else s * _integer_power(s, degree // 2 - 1)
    )
    return half * half


@jax.custom_vjp
def _squares(x: Array) -> Array:
    """Degree 2 in the cyclic-offset layout: x_i x_((i + r) mod D) for r = 0 .. D // 2, each pair once.

    Offset 0 has weight 1, the others sqrt(2); for an even D the last offset, r = D / 2, meets every pair twice, so
    only its first half is kept.
    """
    return _products_by_slices(x) if target_platform() == "tpu" else _products_by_copies(x)


def _products_by_copies(x: Array) -> Array:
    """One vectorised loop over the tokens for all offsets but 0.

    Copies of x laid end to end and cut into rows of D + 1 are its cyclic shifts: row r starts with x_r.
    """
    *batch, D, C = x.shape
    R = D // 2 + 1
    copies = jnp.broadcast_to((SQRT2 * x)[..., None, :, :], (*batch, R + 1, D, C)).reshape(*batch, (R + 1) * D, C)
    shifts = copies[..., : R * (D + 1), :].reshape(*batch, R, D + 1, C)[..., 1:, :D, :]
    pairs = (x[..., None, :, :] * shifts).reshape(*batch, (R - 1) * D, C)
    return jnp.concatenate([x * x, pairs[..., : D * (D - 1) // 2, :]], axis=-2)


def _products_by_slices(x: Array) -> Array:
    """A product for each offset. On a TPU rows of D + 1 are not whole tiles: copies would travel through memory."""
    D = x.shape[-2]
    twice, scaled = jnp.concatenate([x, x], axis=-2), SQRT2 * x
    rows = [scaled * twice[..., r : r + D, :] for r in range(1, D // 2 + 1)]
    if D % 2 == 0:
        rows[-1] = rows[-1][..., : D // 2, :]
    return jnp.concatenate([x * x, *rows], axis=-2)


def _squares_vjp(x: Array, g: Array) -> tuple[Array]:
    """dx_i = sum_r weight_r (g_r[i] x_(i + r) + g_r[i - r] x_(i - r)), indices mod D: slices, not a scatter."""
    D = x.shape[-2]
    twice = jnp.concatenate([x, x], axis=-2)
    total = jnp.zeros_like(x)
    for r in range(1, (D + 1) // 2):
        row = g[..., r * D : (r + 1) * D, :]
        back = jnp.concatenate([row[..., D - r :, :], row[..., : D - r, :]], axis=-2)
        total += row * twice[..., r : r + D, :] + back * twice[..., D - r : 2 * D - r, :]
    if D % 2 == 0:
        half = g[..., D * D // 2 :, :]
        total += jnp.concatenate([half, half], axis=-2) * twice[..., D // 2 : D // 2 + D, :]
    return (SQRT2 * total + 2.0 * g[..., :D, :] * x,)


_squares.defvjp(lambda x: (_squares(x), x), _squares_vjp)


def _monomials(x: Array, degree: int) -> Array:
    """All monomials of one degree, sorted by smallest index, times the square roots of their multinomials.

    Multiplying x_i with the monomials of one degree less whose indices are all >= i, which are the tail of the
    sorted list, gives every monomial once: D contiguous products for each degree, and no gather.
    """
    monomials: Array = x
    for lower in range(1, degree):
        monomials = jnp.asarray(_raise_degree(lower, x, monomials))
    roots = jnp.asarray(_multinomial_roots(x.shape[-2], degree), x.dtype)
    return monomials * roots.reshape((1,) * (x.ndim - 2) + (-1, 1))


def _tails(D: int, lower: int) -> list[int]:
    """Where the monomials of degree `lower` whose indices are all >= i start, for i = 0 .. D; the last is their end."""
    size = math.comb(D + lower - 1, lower)
    return [size - math.comb(D - i + lower - 1, lower) for i in range(D)] + [size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _raise_degree(lower: int, x: Array, monomials: Array) -> Array:
    """The monomials of degree lower + 1 from those of degree `lower`."""
    starts = _tails(x.shape[-2], lower)
    return jnp.concatenate([x[..., i : i + 1, :] * monomials[..., s:, :] for i, s in enumerate(starts[:-1])], axis=-2)


def _raise_degree_vjp(lower: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """Slices and one product with a 0-1 matrix, which sums the rows of each x_i; XLA's own gradient pads each tail."""
    x, monomials = residuals
    D = x.shape[-2]
    starts = _tails(D, lower)
    sizes = [starts[-1] - start for start in starts[:-1]]
    offsets = [sum(sizes[:i]) for i in range(D)]
    tails = jnp.concatenate([monomials[..., start:, :] for start in starts[:-1]], axis=-2)
    rows = jnp.asarray(np.repeat(np.eye(D), sizes, axis=1), x.dtype)
    dx = jnp.broadcast_to(rows, (*x.shape[:-2], *rows.shape)) @ (g * tails)  # batched: unbatched, XLA transposes g

    def block(m: int) -> Array:  # the monomials of degree `lower` whose smallest index is m
        parts = [
            g[..., offsets[i] - starts[i] + starts[m] : offsets[i] - starts[i] + starts[m + 1], :] for i in range(m + 1)
        ]
        total = x[..., :1, :] * parts[0]
        for i in range(1, m + 1):
            total += x[..., i : i + 1, :] * parts[i]
        return total

    return dx, jnp.concatenate([block(m) for m in range(D)], axis=-2)


_raise_degree.defvjp(
    lambda lower, x, monomials: (_raise_degree(lower, x, monomials), (x, monomials)), _raise_degree_vjp
)


def _multinomial_roots(D: int, degree: int) -> np.ndarray:
    """sqrt(p! / (c_1! ... c_D!)) of each monomial, in the order of `_monomials`."""
    counts = single = np.eye(D, dtype=np.int64)
    for lower in range(1, degree):
        counts = np.concatenate([counts[start:] + single[i] for i, start in enumerate(_tails(D, lower)[:-1])])
    factorials = np.array([math.factorial(c) for c in range(degree + 1)], dtype=np.float64)
    return np.sqrt(factorials[degree] / factorials[counts].prod(axis=-1))
