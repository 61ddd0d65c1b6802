"""The layout of the forms that work on chunks: dims first, tokens last, with rows R = B K.

The G queries of a group stand side by side, so that a chunk's are [R, D, G C], its keys [R, D, C].
"""

import jax.numpy as jnp

from sympow_jax.ops.linear_attention.inputs import LinearInputs, extend_values
from sympow_jax.typing import Array, Float

Columns = tuple[tuple[Array, Array, Array], Array, Array]


def to_columns(inputs: LinearInputs, chunks: tuple[int, ...]) -> Columns:
    """(q, k, [v, 1]), log gates and runs of chunks that divide T: [*chunks, R, dims, tokens], the last [.., R, C]."""
    B, _, K, _, D = inputs.q.shape

    def columns(x):  # [B, T, K, ...] -> [*chunks, R, ..., C]
        x = x.reshape(B, *chunks, -1, *x.shape[2:])
        N = len(chunks)
        x = jnp.moveaxis(x, (0, N + 2, N + 1), (N, N + 1, -1))
        return x.reshape(*chunks, B * K, *x.shape[N + 2 :])

    q = columns(jnp.moveaxis(inputs.q, 3, 4)).reshape(*chunks, B * K, D, -1)
    tokens = (q, columns(inputs.k), columns(extend_values(inputs.v, inputs.valid)))
    runs = columns(jnp.broadcast_to(inputs.runs[..., None], inputs.k.shape[:3]))
    return tokens, columns(inputs.log_gates), runs


def from_columns(out: Float[Array, "*N R Dv GC"], inputs: LinearInputs) -> Float[Array, "B T K G Dv"]:
    """Outputs of the queries, as the `inputs` that were padded and brought to columns had them."""
    B, T, K, G, _ = inputs.q.shape
    Dv, C = out.shape[-2], out.shape[-1] // G
    out = jnp.transpose(out.reshape(-1, B, K, Dv, G, C), (1, 0, 5, 2, 4, 3))
    return out.reshape(B, -1, K, G, Dv)[:, :T]
