"""The attention kernels that JAX ships for accelerators: cuDNN's on GPUs, splash attention (Pallas) on TPUs.

They compute plain causal attention, with grouped queries and a window; splash attention takes packed documents too,
and cuDNN's takes ALiBi as more dims of queries and keys (`key_bias`). Neither takes other additive biases
without a T x T array, which is what `blockwise` is for. FoX's gates fold as ALiBi does, for what is not differentiated:
their gradient, the small difference of sums over queries and over keys, would have the rounding of what the kernel
returns in bfloat16.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sympow_jax.ops.platform import target_platform, unsplit
from sympow_jax.ops.residuals import ATTENTION
from sympow_jax.ops.softmax_attention import key_bias
from sympow_jax.ops.softmax_attention.blockwise import blockwise
from sympow_jax.ops.softmax_attention.inputs import Inputs

KERNELS: dict[str, Literal["cudnn", "pallas"]] = {"gpu": "cudnn", "tpu": "pallas"}
LANES = 128  # of a TPU: tiles of splash attention are multiples of it
LARGEST_TILE = 512


def obstacle(name: str, x: Inputs, *, cached: bool) -> str | None:
    """What keeps the kernel `name` from computing this call here, or None."""
    if x.sinks is not None:
        return "it takes no sinks"
    if name != "cudnn" and (x.gates is not None or x.bias is not None):
        return "it takes no log_gates or bias"
    if cached:
        return "it takes no key_positions"
    if name == "cudnn":
        return _obstacle_to_cudnn(x)
    if target_platform() != "tpu":
        return "it needs a TPU"
    if x.q.shape[1] % LANES:
        return f"T={x.q.shape[1]} is not a multiple of {LANES}"
    if not unsplit():
        return "XLA cannot split it over devices; call it inside shard_map"
    return None


def _obstacle_to_cudnn(x: Inputs) -> str | None:
    if target_platform() != "gpu" or jax.default_backend() != "gpu":
        return "it needs a GPU in this process"  # which JAX asks for its compute capability
    if x.segments is not None:
        return "it takes no segment_ids"
    if x.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {x.q.dtype}, not bfloat16 or float16"
    folds = x.bias is not None or x.gates is not None
    if folds and (reason := key_bias.obstacle(x)):
        return reason
    D, Dv, most = x.q.shape[-1], x.v.shape[-1], LANES - key_bias.EXTRA_DIMS if folds else LANES
    return None if Dv == D and D % 8 == 0 and most >= D else f"D={D}, Dv={Dv} are not equal multiples of 8 up to {most}"


def cudnn(
    x: Inputs, *, scale: float, window: int | None, block_size: int = LARGEST_TILE, implementation: Any = "cudnn"
) -> jax.Array:
    """`jax.nn.dot_product_attention`; gates with a gradient, or whose sum is too large to fold, take `blockwise`."""
    kernel = partial(_dot_product_attention, scale=scale, window=window, implementation=implementation)
    if x.gates is None:
        return kernel(x)
    exact = partial(blockwise, scale=scale, window=window, block_size=block_size)
    arrays, tree = jax.tree.flatten(x)
    forms = (lambda arrays: kernel(tree.unflatten(arrays))), (lambda arrays: exact(tree.unflatten(arrays)))
    return _undifferentiated(*forms, key_bias.largest_sum(x), arrays)


def _dot_product_attention(x: Inputs, *, scale: float, window: int | None, implementation: Any) -> jax.Array:
    """Its window counts the tokens before the query."""
    local: Any = None if window is None else (window - 1, 0)
    q, k, v = x.q, x.k, x.v
    if x.bias is not None or x.gates is not None:
        q, k = key_bias.folded(x, scale)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, key_bias.EXTRA_DIMS)))  # as wide as the keys
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=local, implementation=implementation
    )
    return out[..., : x.v.shape[-1]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _undifferentiated(kernel: Any, exact: Any, largest_sum: jax.Array, arrays: list[jax.Array]) -> jax.Array:
    """`kernel(arrays)` where gates of this sum fold, else `exact(arrays)`, which has the gradients too."""
    return jax.lax.cond(largest_sum <= key_bias.LARGEST_SUM, kernel, exact, arrays)


def _exact_forward(kernel, exact, largest_sum, arrays):
    del largest_sum
    return jax.vjp(exact, arrays)


def _exact_backward(kernel, exact, vjp, d_out):
    return None, *vjp(d_out)


_undifferentiated.defvjp(_exact_forward, _exact_backward)


def splash(x: Inputs, *, scale: float, window: int | None, interpret: bool = False) -> jax.Array:
    """Splash attention, which visits only tiles that the mask, causal or a window of it, does not rule out."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, T, H, _ = x.q.shape
    shape = (T, T)
    mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    tile = next(size for size in (LARGEST_TILE, 256, LANES) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": tile for name in names}
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * H),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (x.q * jnp.asarray(scale, x.q.dtype), x.k, x.v))
    if x.segments is None:
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)
    ids = splash_attention_kernel.SegmentIds(*x.segments)
    out = jnp.swapaxes(jax.vmap(kernel)(q, k, v, segment_ids=ids), 1, 2)
    return jnp.where((x.segments[0] != 0)[:, :, None, None], out, jnp.zeros((), out.dtype))  # padding sees padding
