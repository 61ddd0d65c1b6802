"""Degree-2 features inside a TPU kernel: tokens on lanes, one row for each product x_i x_((i + r) mod D).

The rows of offset r = 8 a + b are x times x rotated up by b rows, then by 8 a, which moves no data: eight rotations
serve all offsets. So b is the outer loop of the order of features, and a permutation of blocks of D rows leads to the
library's order. Taylor's kernel adds the rows x, and a tile with the constant 1.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sympow_jax.ops.linear_attention.kernels import SQRT2
from sympow_jax.ops.linear_attention.pallas_tpu.tiles import SUBLANES, dot_in_two
from sympow_jax.typing import Array

Ref = Any
ROWS_OF_A_BLOCK = 128  # a tile of the matrix unit


@dataclasses.dataclass(frozen=True)
class Block:
    """The features that one product takes: their rows, and the offsets of all but the last block."""

    rows: slice
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Features:
    """phi of the power kernel of degree 2, or of Taylor's kernel, for a head_dim that is a multiple of 16.

    Attributes:
      head_dim: D, of q and k with the zeros that they are padded with.
      taylor: whether 1 and x are features as well; the squares then have half the weight.
    """

    head_dim: int
    taylor: bool

    @property
    def squares(self) -> int:
        """Rows of products of two entries, D (D + 1) / 2."""
        return self.head_dim * (self.head_dim + 1) // 2

    @property
    def rows(self) -> int:
        """P, all rows of phi."""
        return self.squares + self.taylor * (self.head_dim + SUBLANES)

    @property
    def moments(self) -> int:
        """Rows of what the normaliser takes second moments of: x, for Taylor's kernel also 1."""
        return self.head_dim + self.taylor * SUBLANES

    @property
    def offsets(self) -> list[int]:
        """The offsets r < D / 2 in the kernel's order."""
        return sorted(range(self.head_dim // 2), key=lambda r: (r % SUBLANES, r))

    def blocks(self) -> list[Block]:
        """What one product takes each; the last has the half offset and what Taylor's kernel adds."""
        D = self.head_dim
        step = math.lcm(ROWS_OF_A_BLOCK, D) // D
        found = [self.offsets[start : start + step] for start in range(0, D // 2, step)]
        blocks = [Block(slice(step * n * D, (step * n + len(r)) * D), tuple(r)) for n, r in enumerate(found)]
        return [*blocks, Block(slice(D * D // 2, self.rows), ())]

    def expand(self, block: Block, x: Array, dtype, weights: Array | None = None) -> Array:
        """The rows of `block` of phi(x), times weights [1, c] of the tokens."""
        D, pair = self.head_dim, 1.0 if self.taylor else SQRT2
        weighted = x if weights is None else x * weights
        if block.offsets:
            scaled = [weighted * (pair if r else pair / SQRT2) for r in block.offsets]
            rows = [a * b for a, b in zip(scaled, _rotations(x, block.offsets), strict=True)]
        else:
            rows = [pair * weighted[: D // 2] * x[D // 2 :]]
        if self.taylor and not block.offsets:
            augmented = self.augment(x)
            rows.append(augmented if weights is None else augmented * weights)
        return jnp.concatenate([row.astype(dtype) for row in rows], axis=0)

    def contract(self, block: Block, dphi: Array, x: Array, sums: dict[str, Array]) -> None:
        """Adds what dphi [rows of the block, c] gives to the sums that `gradient` ends with."""
        D = self.head_dim
        for n, (r, rotated) in enumerate(zip(block.offsets, _rotations(x, block.offsets), strict=True)):
            row = dphi[n * D : (n + 1) * D]
            _add(sums, "pairs" if r else "square", row * rotated)
            if r:
                b = r % SUBLANES
                _add(sums, f"from {b}", _up(row * x, b - r))
        if not block.offsets:
            half = dphi[: D // 2]
            _add(sums, "pairs", jnp.concatenate([half * x[D // 2 :], half * x[: D // 2]], axis=0))
            if self.taylor:
                _add(sums, "linear", dphi[D // 2 : D // 2 + D])
                _add(sums, "constant", dphi[D // 2 + D : D // 2 + D + 1])

    def gradient(self, x: Array, sums: dict[str, Array]) -> tuple[Array, Array]:
        """phi(x) . dphi, [1, c], and its gradient in x, [D, c], from the sums over all blocks."""
        pair = 1.0 if self.taylor else SQRT2
        pairs = sums["pairs"]
        for b in range(SUBLANES):
            back = sums.get(f"from {b}")
            if back is not None:
                pairs += jnp.concatenate([back[-b:], back[:-b]], axis=0) if b else back
        gradient = pair * pairs + (pair * SQRT2) * sums["square"]
        value = 0.5 * jnp.sum(x * gradient, axis=0, keepdims=True)
        if not self.taylor:
            return value, gradient
        value += jnp.sum(x * sums["linear"], axis=0, keepdims=True) + sums["constant"]
        return value, gradient + sums["linear"]

    def augment(self, x: Array) -> Array:
        """x [D, c], for Taylor's kernel with a tile of rows below whose first is 1: what the normaliser multiplies."""
        if not self.taylor:
            return x
        first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0) == 0
        return jnp.concatenate([x, jnp.where(first, 1.0, 0.0).astype(x.dtype)], axis=0)

    def quadratic(self, x: Array, moments: Ref, dtype) -> tuple[Array, Array]:
        """phi(x) . z, [1, c], and its gradient in x, [D, c], from the second moments of the keys behind z."""
        augmented = self.augment(x)
        product = dot_in_two(moments[...], augmented.astype(dtype), 1, 0)
        total = jnp.sum(augmented * product, axis=0, keepdims=True)
        if not self.taylor:
            return total, 2.0 * product
        one = self.head_dim
        return 0.5 * (total + moments[one : one + 1, one : one + 1]), product[:one]

    def moments_cotangent(self, x: Array, dden: Array, dtype) -> Array:
        """The sum over tokens of dden times the gradient of `quadratic` in the moments, [M, M]."""
        augmented = self.augment(x)
        coefficient = 0.5 * dden if self.taylor else dden
        total = dot_in_two(augmented * coefficient, augmented.astype(dtype), 1, 1)
        if not self.taylor:
            return total
        row, column = (jax.lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 1))
        one = (row == self.head_dim) & (column == self.head_dim)
        return total + jnp.where(one, jnp.sum(coefficient, axis=1, keepdims=True), 0.0)


def _rotations(x: Array, offsets: tuple[int, ...]) -> list[Array]:
    """x rotated up by each offset; those that are equal mod 8 share the rotation inside tiles."""
    inside = {b: jnp.concatenate([x[b:], x[:b]], axis=0) if b else x for b in {r % SUBLANES for r in offsets}}
    return [_up(inside[r % SUBLANES], r - r % SUBLANES) for r in offsets]


def _up(x: Array, rows: int) -> Array:
    """x rotated up by a multiple of 8 rows, which renames registers."""
    rows %= x.shape[0]
    return jnp.concatenate([x[rows:], x[:rows]], axis=0) if rows else x


def _add(sums: dict[str, Array], name: str, x: Array) -> None:
    sums[name] = sums[name] + x if name in sums else x
