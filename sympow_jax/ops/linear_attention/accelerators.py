"""The fused kernels of accelerators, imported where they run."""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs
from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel
from sympow_jax.ops.platform import interpretation, target_platform
from sympow_jax.typing import Array, Float

CHUNKS = {"tpu": 256, "gpu": 512}  # tokens: the fewest bundles on TPUs; on GPUs a state in memory for each
WIDEST_ON_GPU = 128  # head_dim, and that of values: one offset of the state fills the registers of a program


def obstacle(
    kernel: Kernel, *, head_dim: int, value_dim: int, dtype: jnp.dtype, vector_gates: bool = False
) -> str | None:
    """What keeps the kernels from computing such a call here, or None."""
    if vector_gates:
        return "gates of every dim, and it is for one gate a head"
    if target_platform() == "cpu" and not interpretation():
        return "it needs a TPU or a GPU"
    if isinstance(kernel, PowerKernel) and kernel.degree != 2:
        return f"degree={kernel.degree}, and it is for degree 2"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {dtype}, not float32 or bfloat16"
    sizes = f"head_dim={head_dim} with values of {value_dim}"
    if target_platform() == "gpu":
        if not isinstance(kernel, PowerKernel):
            return "Taylor's kernel, which it computes on a TPU alone"
        if max(head_dim, value_dim) > WIDEST_ON_GPU:
            return f"{sizes}, and on a GPU it is for at most {WIDEST_ON_GPU}"
        return None
    from sympow_jax.ops.linear_attention.pallas_tpu.tiles import VMEM_BYTES, vmem_bytes

    needed = vmem_bytes(kernel.num_features(head_dim), value_dim)
    if needed > VMEM_BYTES:
        return f"{sizes} takes {needed / 2**20:.0f} MiB of on-chip memory, more than {VMEM_BYTES // 2**20}"
    return None


def preferred(kernel: Kernel, *, head_dim: int, value_dim: int, dtype: jnp.dtype, vector_gates: bool = False) -> bool:
    """Whether the kernels compute such a call unasked: on a TPU, where they can; a GPU's must be asked for."""
    call = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype, "vector_gates": vector_gates}
    return target_platform() != "gpu" and obstacle(kernel, **call) is None


def sizes_of(inputs: LinearInputs) -> dict:
    """The arguments of `obstacle` and `preferred` that a call's arrays tell."""
    sizes = {"head_dim": inputs.k.shape[-1], "value_dim": inputs.v.shape[-1]}
    return sizes | {"dtype": jnp.result_type(inputs.k.dtype), "vector_gates": inputs.has_vector_gates}


def chunk_length() -> int:
    """Tokens in a chunk, if nobody says."""
    return CHUNKS["gpu" if target_platform() == "gpu" else "tpu"]


def pallas(
    kernel: Kernel, inputs: LinearInputs, state: Float[Array, "B K P Dv1"], chunk_size: int
) -> tuple[Float[Array, "B T K G Dv"], Float[Array, "B K P Dv1"]]:
    """`chunked` in a few kernels: on a TPU one forward and two backward, on a GPU two and four."""
    if target_platform() == "gpu":
        from sympow_jax.ops.linear_attention.pallas_gpu import op

        return op.fused(kernel, inputs, state, chunk_size)
    from sympow_jax.ops.linear_attention.pallas_tpu.op import fused

    return fused(kernel, inputs, state, chunk_size)


def pallas_state(kernel: Kernel, inputs: LinearInputs, chunk_size: int) -> Float[Array, "B K P Dv1"]:
    """`write_state` from nothing, in one kernel forward and one backward."""
    if target_platform() == "gpu":
        from sympow_jax.ops.linear_attention.pallas_gpu import op

        return op.fused_state(kernel, inputs)
    from sympow_jax.ops.linear_attention.pallas_tpu.op import fused_state

    return fused_state(kernel, inputs, chunk_size)
