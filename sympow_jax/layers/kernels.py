"""The registry of linear kernels: one line per kernel."""

from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel, TaylorKernel


def linear_kernel(name: str, *, degree: int) -> Kernel:
    """The kernel that a config names; degree is used by `power` only. ReBased is degree 2 on transformed q and k."""
    return {
        "power": PowerKernel(degree),
        "rebased": PowerKernel(2),
        "taylor": TaylorKernel(),
    }[name]
