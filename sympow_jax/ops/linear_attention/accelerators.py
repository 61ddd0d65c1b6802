"""The fused kernels of accelerators, imported where they run."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs
from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel
from sympow_jax.ops.platform import interpretation, target_platform
from sympow_jax.typing import Array, Float

CHUNK = 256  # tokens: the fewest bundles on v5e, v5p and v6e


def obstacle(kernel: Kernel, *, head_dim: int, value_dim: int, dtype: jnp.dtype) -> str | None:
    """What keeps the kernels from computing such a call here, or None."""
    if target_platform() != "tpu" and not interpretation():
        return "it needs a TPU"
    if isinstance(kernel, PowerKernel) and kernel.degree != 2:
        return f"degree={kernel.degree}, and it is for degree 2"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {dtype}, not float32 or bfloat16"
    from sympow_jax.ops.linear_attention.pallas_tpu.tiles import VMEM_BYTES, vmem_bytes

    needed = vmem_bytes(kernel.num_features(head_dim), value_dim)
    if needed > VMEM_BYTES:
        sizes = f"head_dim={head_dim} with values of {value_dim}"
        return f"{sizes} takes {needed / 2**20:.0f} MiB of on-chip memory, more than {VMEM_BYTES // 2**20}"
    return None


def obstacle_to(kernel: Kernel, inputs: LinearInputs) -> str | None:
    """`obstacle` of a call."""
    return obstacle(
        kernel, head_dim=inputs.k.shape[-1], value_dim=inputs.v.shape[-1], dtype=jnp.result_type(inputs.k.dtype)
    )


def pallas(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` in one kernel forward and two backward."""
    from sympow_jax.ops.linear_attention.pallas_tpu.op import fused

    return fused(kernel, inputs, state, chunk_size)


def pallas_state(kernel: Kernel, inputs: LinearInputs, chunk_size: int) -> Float[Array, "B K P Dv1"]:
    """`write_state` from nothing, in one kernel forward and one backward."""
    from sympow_jax.ops.linear_attention.pallas_tpu.op import fused_state

    return fused_state(kernel, inputs, chunk_size)
