"""Array aliases, the symbol legend and the dtype policy; everything may import this module.

Symbols in shapes, used in every docstring and einsum of the project:

    B batch        T query positions   S key positions, where they differ from T
    H query heads  K kv heads          D head_dim of q and k    Dv head_dim of v
    P expanded feature (state) size    N chunks                 C positions in a chunk
    E embed_dim    F mlp_dim           V vocab_size             L layers

Dtype policy: parameters are stored in `param_dtype` (float32), matrix products run in `dtype` (float32 or
bfloat16), and states, gates, phases, normalisers, softmax statistics, losses and every reduction stay in float32.
With `jax_enable_x64` on, the reference implementations compute in float64 when given float64 inputs: the oracle.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Integer", "PRNGKeyArray", "PyTree", "accumulation_dtype"]

PyTree = Any
AnyArray = jax.Array | np.ndarray  # what jitted functions take: arrays of a device or of the host


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of states and reductions: float32, or float64 when any input is float64."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)
