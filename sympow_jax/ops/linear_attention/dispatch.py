"""Which form runs: the one that was named, or the cheapest by a small measured table."""

from typing import Literal, cast, get_args

from sympow_jax.ops.linear_attention import accelerators
from sympow_jax.ops.linear_attention.inputs import LinearInputs
from sympow_jax.ops.linear_attention.kernels import Kernel, PowerKernel
from sympow_jax.ops.platform import unsplit

LinearForm = Literal["chunked", "recurrent"]  # linear in T, with a state
Implementation = Literal["reference", "blockwise", "pallas"] | LinearForm
LINEAR_FORMS: tuple[LinearForm, ...] = get_args(LinearForm)

# float32 features of a chunk that the caches of two cores hold: 256 tokens of degree 2 at D = 64 or degree 4 at D = 16
CACHED_FEATURES = 1_000_000
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "blockwise", *LINEAR_FORMS)  # on every platform


def choose(
    kernel: Kernel, inputs: LinearInputs, implementation: str | None, chunk_size: int | None
) -> tuple[Implementation, int]:
    """The form and its chunk or block length; a named form that cannot do the job raises one line."""
    T, D = inputs.k.shape[1], inputs.k.shape[3]
    if implementation is None:
        implementation = cheapest(kernel, T, kernel.num_features(D), has_bias=inputs.bias is not None)
        if implementation == "chunked" and chunk_size is None:
            implementation = fastest_chunked(kernel, inputs)
    names = (*IMPLEMENTATIONS, "pallas")
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(names)}, or None")
    if inputs.bias is not None and implementation in (*LINEAR_FORMS, "pallas"):
        raise ValueError(
            f"implementation={implementation!r} cannot add a bias (no linear form); use 'reference' or 'blockwise'"
        )
    reason = None
    if implementation == "pallas":
        reason = accelerators.obstacle(kernel, **accelerators.sizes_of(inputs))
    if reason:
        raise ValueError(f"implementation='pallas': {reason}; use 'chunked', or None")
    if chunk_size is None:
        chunk_size = measured_length(implementation, kernel.num_features(D))
    return cast(Implementation, implementation), min(chunk_size, T)


def fastest_chunked(kernel: Kernel, inputs: LinearInputs) -> Implementation:
    """The accelerator's kernel where it surely runs, else XLA's form."""
    return "pallas" if unsplit() and accelerators.preferred(kernel, **accelerators.sizes_of(inputs)) else "chunked"


def measured_length(implementation: str, num_features: int) -> int:
    """The best chunk or block length: on CPU, chunks as long as their features stay in the caches."""
    if implementation == "pallas":
        return accelerators.chunk_length()
    return 256 if implementation == "chunked" and 256 * num_features <= CACHED_FEATURES else 128


def cheapest(kernel: Kernel, seq_len: int, num_features: int, *, has_bias: bool) -> Implementation:
    """The cheapest form, from where forward + backward of chunked and blockwise cross on CPU.

    Measured at 4 heads: between 512 and 2,048 tokens for 528 features of degree 2, and between 8,192 and 16,384 for
    3,876 features of degree 4, whose expansion costs more than its products.
    """
    if has_bias:
        return "blockwise"
    if seq_len == 1:
        return "recurrent"
    expensive = isinstance(kernel, PowerKernel) and kernel.degree > 2
    crossing = 4 * num_features if expensive else num_features + 512
    return "chunked" if seq_len > crossing else "blockwise"
