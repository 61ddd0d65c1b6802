"""The registry of linear kernels: one line per kernel, the four functions that a layer calls."""

import dataclasses
import functools
from collections.abc import Callable

from sympow_jax import ops


@dataclasses.dataclass(frozen=True)
class LinearKernel:
    """The op of a kernel in its three forms, and its empty state."""

    attention: Callable
    attention_with_state: Callable
    step: Callable
    initial_state: Callable


def linear_kernel(name: str, *, degree: int) -> LinearKernel:
    """The functions of kernel `name`; degree is used by `power` only. ReBased is degree 2 on transformed q and k."""
    degrees = {"power": degree, "rebased": 2}
    if name in degrees:
        partial = functools.partial(functools.partial, degree=degrees[name])
        return LinearKernel(
            partial(ops.power_attention),
            partial(ops.power_attention_with_state),
            partial(ops.power_step),
            partial(ops.power_initial_state),
        )
    return {"taylor": LinearKernel(
        ops.taylor_attention, ops.taylor_attention_with_state, ops.taylor_step, ops.taylor_initial_state
    )}[name]  # fmt: skip
