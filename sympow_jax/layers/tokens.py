"""What the attention of a layer needs of each token."""

import dataclasses

import jax

from sympow_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The projections of T tokens.

    Attributes:
      q, k, v: [B, T, H, D], [B, T, K, D], [B, T, K, Dv], in the compute dtype.
      beta: [B, T, K] float32, the rotary step of learned_rope, [B, T, K, F] where every frequency has one, or None.
      log_gates: [B, T, G] float32, G the kv heads under a linear kernel and the query heads under softmax, [B, T, K, D]
        where every dim has a gate, or None.
      sinks: [H] float32, the same for all tokens: the logit of a key without a value; None under a linear kernel.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K Dv"]
    beta: Float[Array, "B T K *F"] | None
    log_gates: Float[Array, "B T G *D"] | None
    sinks: Float[Array, "H"] | None = None
