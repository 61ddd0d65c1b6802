"""What the GPU kernels share: sizes of tiles, rotations of features, and the decays between two tiles of a chunk.

A head is a matrix in memory, tokens by entries, at a stride; nothing is moved to bring its tokens together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sympow_jax.ops.linear_attention.pallas_shared import DECAYS, ROWS, cost
from sympow_jax.ops.platform import interpretation
from sympow_jax.typing import Array

Ref = Any
Tokens = Any  # pl.ds: where some tokens start, and how many they are
F32 = jnp.float32
WARPS, STAGES = 8, 2  # of a program, and of the pipelines of its loads
SMALLEST = 16  # of the sides of a product; all are powers of two


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that leave every kernel its registers, for H100 and A100.

    Attributes:
      chunk: tokens between two states in memory.
      rows: tokens of the tile that a program of queries or keys has; 64 is the least that an H100's wgmma takes.
      step: tokens that such a tile attends to, or that a walk over a row takes, at a time, and entries of x in a part
        of its features: an A100, whose operands are in registers, spills with more.
    """

    chunk: int
    rows: int
    step: int

    @classmethod
    def of(cls, chunk_size: int, dtype: Any) -> "Tiles":
        """Chunks of `chunk_size` tokens, rounded up to whole tiles."""
        rows = SMALLEST if interpretation() else 128 // jnp.dtype(dtype).itemsize
        return cls(-(-chunk_size // rows) * rows, rows, rows // 2)

    def parts(self, head_dim: int) -> list[slice]:
        """The entries of x, some at a time."""
        return [slice(i, min(i + self.step, head_dim)) for i in range(0, head_dim, self.step)]


def padded(size: int) -> int:
    """The power of two that a head_dim is padded to with zeros."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def num_offsets(head_dim: int) -> int:
    """The offsets r = 0 .. D / 2 of the products x_i x_((i + r) mod D); the last meets every pair twice."""
    return head_dim // 2 + 1


def turned(part: slice, r: Array | int, head_dim: int) -> Array:
    """The indices (i + r) mod D of a part of the entries."""
    return (jax.lax.iota(jnp.int32, part.stop - part.start) + (part.start + r)) & (head_dim - 1)


def positions(tokens: Tokens) -> Array:
    """The indices of some tokens."""
    return tokens.start + jax.lax.iota(jnp.int32, tokens.size)


def rotated(x: Ref, tokens: Tokens, part: slice, r: Array | int, *query: Array) -> Array:
    """x_((i + r) mod D) of some tokens, [tokens, part], float32: the cache is read again, not memory."""
    return x[(positions(tokens)[:, None], *query, turned(part, r, x.shape[-1])[None, :])].astype(F32)


def over_offsets(head_dim: int, body: Callable[..., Any], init: Any) -> Any:
    """A loop over all offsets."""
    return jax.lax.fori_loop(0, num_offsets(head_dim), body, init)


def decay(decays: Ref, name: str, tokens: Tokens) -> Array:
    """One of ROWS for some tokens."""
    return decays[ROWS.index(name), tokens]


def pairs(decays: Ref, queries: Tokens, keys: Tokens, *, query_axis: int) -> Array:
    """exp(G_i - G_j) between some queries and keys of a chunk; 0 where i does not see j."""
    key_axis = 1 - query_axis

    def difference(name: str) -> Array:
        i, j = decay(decays, name, queries), decay(decays, name, keys)
        return jnp.expand_dims(i, key_axis) - jnp.expand_dims(j, query_axis)

    causal = jnp.expand_dims(positions(queries), key_axis) >= jnp.expand_dims(positions(keys), query_axis)
    visible = causal & (difference("runs") == 0.0)
    return jnp.exp(jnp.where(visible, difference("whole") + difference("rest"), -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Programs (tile m of a chunk, chunk n, query g of a group, kv head h, row b of the batch), m the fastest."""

    tiles: Tiles
    tokens: int
    queries: int
    heads: int
    batch: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the grid."""
        chunk, rows = self.tiles.chunk, self.tiles.rows
        return chunk // rows, self.tokens // chunk, self.queries, self.heads, self.batch

    def tile(self, size: int) -> pl.BlockSpec:
        """Of an array [B, T, K, size]: the tokens of a tile."""
        M, rows = self.sizes[0], self.tiles.rows
        return pl.BlockSpec((None, rows, None, size), lambda m, n, g, h, b: (b, n * M + m, h, 0))

    def query_tile(self, size: int) -> pl.BlockSpec:
        """Of an array [B, T, K, G, size]: those of a query."""
        M, rows = self.sizes[0], self.tiles.rows
        return pl.BlockSpec((None, rows, None, None, size), lambda m, n, g, h, b: (b, n * M + m, h, g, 0))

    def query_row(self) -> pl.BlockSpec:
        """Of an array [B, K, G, T]: a number for each of them."""
        M, rows = self.sizes[0], self.tiles.rows
        return pl.BlockSpec((None, None, None, rows), lambda m, n, g, h, b: (b, h, g, n * M + m))

    def row(self) -> pl.BlockSpec:
        """Of an array [B, K, T]."""
        M, rows = self.sizes[0], self.tiles.rows
        return pl.BlockSpec((None, None, rows), lambda m, n, g, h, b: (b, h, n * M + m))

    def chunk(self, size: int) -> pl.BlockSpec:
        """Of an array [B, T, K, size]: the tokens of a chunk."""
        return pl.BlockSpec((None, self.tiles.chunk, None, size), lambda m, n, g, h, b: (b, n, h, 0))

    def queries_chunk(self, group: int, size: int) -> pl.BlockSpec:
        """Of an array [B, T, K, G, size]: those of all queries."""
        block = (None, self.tiles.chunk, None, group, size)
        return pl.BlockSpec(block, lambda m, n, g, h, b: (b, n, h, 0, 0))

    def rows_chunk(self, count: int = DECAYS) -> pl.BlockSpec:
        """Of an array [B, K, count, T]."""
        return pl.BlockSpec((None, None, count, self.tiles.chunk), lambda m, n, g, h, b: (b, h, 0, n))

    def state(self, *shape: int) -> pl.BlockSpec:
        """Of an array [B, K, N, *shape]: that of a chunk."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda m, n, g, h, b: (b, h, n, *zeros))


def call(
    name: str,
    body: Callable[..., None],
    grid: tuple[int, ...],
    arrays: Any,
    *,
    blocks: Any,
    out: Any,
    macs: int,
) -> Any:
    """`pallas_call` in Triton's semantics.

    Args:
      name: of the kernel, in profiles and compiled programs.
      body: the kernel.
      grid: its programs, the fastest first.
      arrays, blocks: the arguments and their BlockSpecs.
      out: (shape, dtype, BlockSpec) of each result.
      macs: multiply-adds of all its products, which the planner is told.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in out]
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=blocks,
        out_specs=[spec for _, _, spec in out],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        cost_estimate=cost(macs, (*arrays, *shapes)),
        interpret=bool(interpretation()),
        name=f"linear_attention_{name}",
    )(*arrays)
