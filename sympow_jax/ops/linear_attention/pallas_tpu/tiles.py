"""What the TPU kernels share: sizes of tiles, products, loops, and the decays of a chunk."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sympow_jax.ops.linear_attention.pallas_shared import ROWS, cost, dot
from sympow_jax.ops.platform import interpretation
from sympow_jax.typing import Array

VMEM_BYTES = 60 * 2**20  # what a kernel may take: 64 MiB on v5p, 128 MiB on v5e and v6e
SUBLANES, LANES = 8, 128  # of a float32 tile; a bfloat16 tile has twice the rows
LONGEST_CHUNK = 512
MANY_FEATURES = 4096  # from here on more than two chunks a block take minutes to compile


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens in a chunk, and in the few chunks that one step of the grid lays out one after the other.

    The scheduler fills the gaps of one chunk with the next: on v5e four take 6% fewer bundles each than two.
    """

    chunk: int
    block: int

    @classmethod
    def of(cls, chunk_size: int, seq_len: int, num_features: int) -> "Tiles":
        """Chunks of `chunk_size` tokens, rounded up to whole tiles, in equal blocks that leave little padding."""
        lanes = SUBLANES if interpretation() else LANES
        chunk = min(-(-chunk_size // lanes), LONGEST_CHUNK // lanes) * lanes
        chunks = -(-seq_len // chunk)
        blocks = -(-chunks // (2 if interpretation() or num_features > MANY_FEATURES else 4))
        return cls(chunk, -(-chunks // blocks) * chunk)


@dataclasses.dataclass(frozen=True)
class Decays:
    """The decays of a chunk, one row each (`ROWS`), queries or keys on lanes: [8, C], float32."""

    rows: Array

    def __getitem__(self, name: str) -> Array:
        """One of ROWS, [1, C]."""
        at = ROWS.index(name)
        return self.rows[at : at + 1]

    @property
    def carry(self) -> Array:
        """What the chunk leaves of the state before it, [1, 1]."""
        return self["carry"][:, :1]

    def pairs(self) -> Array:
        """exp(G_i - G_j), keys as rows and queries as columns; 0 where i does not see j."""
        transposed, (_, c) = self.rows.T, self.rows.shape

        def difference(name: str) -> Array:
            at = ROWS.index(name)
            return self[name] - transposed[:, at : at + 1]

        j, i = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
        visible = (difference("runs") == 0.0) & (j <= i)
        return jnp.exp(jnp.where(visible, difference("whole") + difference("rest"), -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Steps:
    """The blocks of a grid (row, step): `count` steps of `tokens` tokens, the last first if `backwards`."""

    tokens: int
    count: int
    backwards: bool = False

    def of_tokens(self, *rows: int) -> pl.BlockSpec:
        """For an array [R, *rows, T]."""
        zeros = (0,) * len(rows)
        step = (lambda t: self.count - 1 - t) if self.backwards else (lambda t: t)
        return pl.BlockSpec((1, *rows, self.tokens), lambda r, t: (r, *zeros, step(t)))

    def of_states(self, *shape: int) -> pl.BlockSpec:
        """For an array [R, *shape], the same at every step."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, *shape), lambda r, t: (r, *zeros))


def dot_in_two(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """`dot` of a float32 and b, which may be bfloat16: a is then split in its rounded values and the remainders."""
    high = a.astype(b.dtype)
    product = dot(high, b, contract_a, contract_b)
    if b.dtype == a.dtype:
        return product
    return product + dot((a - high.astype(a.dtype)).astype(b.dtype), b, contract_a, contract_b)


def each_query(count: int, body: Callable[[Any], None]) -> None:
    """body(0), ..., body(count - 1) for the queries of a group: a loop, for a single one none."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda g, _: body(g), None)


def vmem_bytes(num_features: int, value_dim: int) -> int:
    """About what a kernel takes: the state, with its two buffers each way, and 8 MiB for tokens and registers."""
    return 5 * 4 * num_features * value_dim + 8 * 2**20


def call(
    name: str, body: Callable[..., None], steps: Steps, arrays: Any, *, blocks: Any, out: Any, scratch: Any, macs: int
) -> Any:
    """`pallas_call` over (row, step): rows are independent, time is in order.

    Args:
      name: of the kernel, in profiles and compiled programs.
      body: the kernel.
      steps: its grid, for the rows of the first array.
      arrays, blocks: the arguments and their BlockSpecs.
      out: (shape, dtype, BlockSpec) of each result.
      scratch: shapes of float32 in VMEM.
      macs: multiply-adds of its products for a token of a row, which the planner is told.
    """
    R, T = arrays[0].shape[0], arrays[0].shape[-1]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in out]
    return pl.pallas_call(
        body,
        grid=(R, steps.count),
        in_specs=blocks,
        out_specs=[spec for _, _, spec in out],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost(macs * R * T, (*arrays, *shapes)),
        interpret=interpretation() or False,
        name=f"linear_attention_{name}",
    )(*arrays)
