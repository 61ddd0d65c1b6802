"""Which implementation runs: the one that was named, or the cheapest by a small measured table."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import jax

from sympow_jax.ops.platform import target_platform
from sympow_jax.ops.positions.position_bias import OfDistance, PositionBias
from sympow_jax.ops.softmax_attention import accelerators
from sympow_jax.ops.softmax_attention.blockwise import blockwise
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.ops.softmax_attention.reference import reference

Implementation = Literal["reference", "blockwise", "cudnn", "pallas"]
IMPLEMENTATIONS: dict[Implementation, Callable[..., jax.Array]] = {  # (x, *, scale, window, block_size)
    "reference": reference,
    "blockwise": blockwise,
    "cudnn": accelerators.cudnn,
    "pallas": accelerators.splash,
}
_IN_TILES = ("blockwise", "cudnn")
# Measured on 2 CPU cores, float32, forward and backward: up to 128 x 128 pairs the dense form is as fast as tiles and
# compiles sooner; above, tiles of 128 win by 2-3x at T = 256..512, and tiles of 512 from T = 2048 on.
DENSE_PAIRS = 1 << 14
DENSE_QUERIES = 16  # decoding: a tile would be mostly padding
BLOCK_SIZES = ((1024, 128), (2048, 256))
LARGEST_BLOCK = 512
# FIRE's bias depends on both positions, so each tile evaluates its MLP, of which fewer units switch in a small tile:
# at commit 5c0aa53 forward and backward took 1.5 times softmax_nope's in tiles of 128 and 1.9 times in tiles of 512 at
# T = 2,048, 1.41 and 1.44 at 8,192, 1.49 and 1.41 at 16,384.
LONGEST_FOR_PAIRS = 8_192
# Of all rows and heads on a GPU, so that the few tiles that a step makes stay in its cache (docs/plans: of 4 rows of 12
# heads, tiles of 512 go through memory, and tiles of 256 do not).
GPU_TILE_BYTES = 16 << 20


def attend(
    x: Inputs,
    *,
    scale: float | None,
    window: int | None,
    implementation: str | None,
    block_size: int | None,
    cached: bool,
) -> jax.Array:
    """Runs the implementation that was named or is cheapest; `cached`: the queries are not those of the keys."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: softmax_attention has {', '.join(IMPLEMENTATIONS)}, or None"
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size}: legal are None or integers >= 1")
    scale = float(x.q.shape[-1] ** -0.5 if scale is None else scale)
    chosen = choose(cast(Implementation | None, implementation), x, block_size, cached=cached)
    size = {"block_size": block_size or default_block_size(x.q.shape, x.k.shape[1], window, x.bias)}
    return IMPLEMENTATIONS[chosen](x, scale=scale, window=window, **(size if chosen in _IN_TILES else {}))


def choose(name: Implementation | None, x: Inputs, block_size: int | None, *, cached: bool) -> Implementation:
    """The implementation that was named, or the kernel of the accelerator if there is one, or the measured choice."""
    if name is not None:
        reason = accelerators.obstacle(name, x, cached=cached) if name in accelerators.KERNELS.values() else None
        if reason:
            raise ValueError(f"implementation={name!r}: {reason}; use 'blockwise', or None")
        return name
    kernel = accelerators.KERNELS.get(target_platform())
    if kernel and block_size is None and accelerators.obstacle(kernel, x, cached=cached) is None:
        return kernel
    T, S = x.q.shape[1], x.k.shape[1]
    dense = T <= DENSE_QUERIES or T * S <= DENSE_PAIRS
    return "reference" if dense and block_size is None else "blockwise"


def default_block_size(shape: Sequence[int], S: int, window: int | None, bias: PositionBias | None = None) -> int:
    """By the measured table, no larger than queries [B, T, H, D] or the window can use, or a GPU's cache can hold."""
    B, T, H, _ = shape
    size = next((size for longest, size in BLOCK_SIZES if longest > S), LARGEST_BLOCK)
    of_pairs = bias is not None and not isinstance(bias.function, OfDistance)
    if of_pairs and target_platform() == "cpu" and S <= LONGEST_FOR_PAIRS:
        size = BLOCK_SIZES[0][1]
    while target_platform() == "gpu" and size > 128 and 4 * B * H * size**2 > GPU_TILE_BYTES:
        size //= 2
    return min(size, max(64, T), max(64, window or size), max(T, S))
