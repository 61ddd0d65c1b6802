"""The registry of linear kernels: one line per kernel, its features and the five functions that a layer calls."""

import dataclasses
import functools
from collections.abc import Callable

from sympow_jax import ops
from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel, TaylorKernel


@dataclasses.dataclass(frozen=True)
class LinearKernel:
    """A kernel and its feature expansion, the op in its three forms, and its states: after tokens, and empty."""

    kernel: Kernel
    attention: Callable
    attention_with_state: Callable
    step: Callable
    state: Callable
    initial_state: Callable


def linear_kernel(name: str, *, degree: int) -> LinearKernel:
    """What `name` computes; degree is used by `power` only. ReBased is degree 2 on transformed q and k."""
    return {"power": lambda: _power(degree), "rebased": lambda: _power(2), "taylor": _taylor}[name]()


def _power(degree: int) -> LinearKernel:
    functions = (
        ops.power_attention, ops.power_attention_with_state, ops.power_step, ops.power_state, ops.power_initial_state,
    )  # fmt: skip
    return LinearKernel(PowerKernel(degree), *(functools.partial(function, degree=degree) for function in functions))


def _taylor() -> LinearKernel:
    functions = (
        ops.taylor_attention, ops.taylor_attention_with_state, ops.taylor_step, ops.taylor_state,
        ops.taylor_initial_state,
    )  # fmt: skip
    return LinearKernel(TaylorKernel(), *functions)
