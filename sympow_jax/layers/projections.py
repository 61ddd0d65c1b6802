"""What an attention layer makes of each token: queries, keys, values, gates and steps, and the biases beside them."""

import math

import jax.numpy as jnp
from flax import nnx

from sympow_jax import ops, variants
from sympow_jax.config import LayerSpec, ModelConfig
from sympow_jax.layers.context import Context
from sympow_jax.layers.linear import make_linear
from sympow_jax.layers.norm import LayerNorm
from sympow_jax.layers.position_bias import BiasParameters, fixed_bias
from sympow_jax.layers.rotary import Rotary
from sympow_jax.layers.tokens import Tokens
from sympow_jax.typing import Array, Float


def initial_log_scale(trained: int, window: int | None) -> float:
    """s for which s log n is 1 on average over n = 1 .. trained visible keys, or those of a window: 0.17 at 1,024."""
    count = max(2, trained if window is None else min(trained, window))
    return count / math.lgamma(count + 1)


class Projections(nnx.Module):
    """The parameters of an attention layer: query [E, H D], key [E, K D], value [E, K Dv] and out [H Dv, E].

    And, as the variant needs them, gate [E, G] with bias (data; vector: [E, K N] for N planes and dims) or gate_logits
    [G] (learned), beta [E, K] (learned_rope) or, where every frequency has steps, beta_down [E, R] and beta_up [R, K F]
    of R = position.rotation_rank, bias_parameters (kerple, t5, fire), query_norm and key_norm (qk_norm, rebased) over a
    head or all of them, output_gate [E, H Dv], output_norm over a head, log_length_scale and sinks [H] (softmax). G is
    H under softmax, else K. attention.bias gives the first three, or all four, a bias.
    """

    def __init__(self, spec: LayerSpec, model: ModelConfig, *, rngs: nnx.Rngs):
        self.attention, self.position, self.window = spec.attention, spec.position, spec.window
        attention = self.attention
        self.kernel, self.linear = attention.kernel, attention.is_linear
        self.num_heads, self.num_kv_heads = model.num_heads, model.num_kv_heads
        self.head_dim, self.value_head_dim = spec.qk_head_dim(model), model.head_dim
        self.dtype = model.dtype
        self.rotary = Rotary(attention.position, spec.position, self.head_dim, attention.scale)
        E, H, K, D, Dv = model.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.value_head_dim
        bias = attention.bias != "none"
        self.query = make_linear(model, E, H * D, bias=bias, rngs=rngs)
        self.key = make_linear(model, E, K * D, bias=bias, rngs=rngs)
        self.value = make_linear(model, E, K * Dv, bias=bias, rngs=rngs)
        self.out = make_linear(model, H * Dv, E, bias=attention.bias == "all", residual=True, rngs=rngs)
        if attention.output_gate:
            self.output_gate = make_linear(model, E, H * Dv, rngs=rngs)
        if attention.output_norm:
            self.output_norm = nnx.RMSNorm(Dv, epsilon=model.norm_eps, rngs=rngs)
        if attention.log_length_scale and not self.linear:
            start = initial_log_scale(spec.position.original_length, self.window)
            self.log_length_scale = nnx.Param(jnp.full(H, start, jnp.float32))
        if attention.sinks and not self.linear:
            self.sinks = nnx.Param(jnp.zeros(H, jnp.float32))
        self._make_norms(rngs)
        self._make_gate(model, rngs)
        if attention.position == "learned_rope":
            self._make_steps(model, rngs)
        if attention.position in variants.LEARNED_BIASES:
            self.bias_parameters = BiasParameters(attention.position, H, rngs=rngs)

    def _make_steps(self, model: ModelConfig, rngs: nnx.Rngs) -> None:
        E, R, size = model.embed_dim, self.position.rotation_rank, math.prod(self.steps_shape)
        if self.position.rotation == "scalar":
            self.beta = make_linear(model, E, size, dtype="float32", rngs=rngs)
            return
        self.beta_down = make_linear(model, E, R, dtype="float32", rngs=rngs)
        std = R**-0.5  # the product varies as one matrix with model.init_std would
        self.beta_up = make_linear(model, R, size, dtype="float32", std=std, rngs=rngs)

    @property
    def steps_shape(self) -> tuple[int, ...]:
        """Rotary steps of a token: K, or K, F where every frequency has its own."""
        K, F = self.num_kv_heads, self.rotary.num_rotated // 2
        return (K, F) if self.position.rotation == "frequency" else (K,)

    def steps(self, x: Float[Array, "B T E"]) -> Float[Array, "B T K *F"] | None:
        """beta = 1 + tanh(W x), in float32, the rotary steps of learned_rope, or None."""
        if self.attention.position != "learned_rope":
            return None
        x = x.astype(jnp.float32)
        logits = self.beta(x) if self.position.rotation == "scalar" else self.beta_up(self.beta_down(x))
        return 1.0 + jnp.tanh(logits.reshape(*x.shape[:2], *self.steps_shape))

    def _make_norms(self, rngs: nnx.Rngs) -> None:
        a, H, K, D = self.attention, self.num_heads, self.num_kv_heads, self.head_dim
        if self.kernel == "rebased":
            norm, span, eps = LayerNorm, a.rebased_norm, 1e-5
        elif a.qk_norm:
            norm, span, eps = nnx.RMSNorm, a.qk_norm_span, a.qk_norm_eps
        else:
            return
        self.norms_all_heads = span == "concatenated"
        self.query_norm = norm(H * D if self.norms_all_heads else D, epsilon=eps, rngs=rngs)
        self.key_norm = norm(K * D if self.norms_all_heads else D, epsilon=eps, rngs=rngs)

    def _make_gate(self, model: ModelConfig, rngs: nnx.Rngs) -> None:
        a, heads = self.attention, self.num_kv_heads if self.linear else self.num_heads
        initial = {
            "zero": jnp.zeros(heads),
            "long": jnp.full(heads, ops.gates.POWER_GATE_BIAS, jnp.float32),
            "timescales": jnp.asarray(
                ops.gates.time_scale_logits(heads, a.gate_min_timescale, a.gate_max_timescale), jnp.float32
            ),
        }[a.gate_init]
        if a.gate == "vector":
            numbers = self.head_dim - self.rotary.num_rotated // 2  # one a plane, one a dim that is not rotated
            heads, initial = heads * numbers, jnp.repeat(initial, numbers)
        if a.gate in ("data", "vector"):
            self.gate = make_linear(model, model.embed_dim, heads, bias=True, dtype="float32", rngs=rngs)
            self.gate.bias = nnx.Param(initial)
        elif a.gate == "learned":
            self.gate_logits = nnx.Param(initial)

    def tokens(self, x: Float[Array, "B T E"], context: Context) -> Tokens:
        """What the kernel needs of each token of a whole pass, before rotations.

        Scalable softmax (Nakanishi 2025, arXiv 2501.19399) is in the queries: s log n of them for n visible keys.
        """
        q, k = self._queries_and_keys(x)
        if hasattr(self, "log_length_scale"):
            n = context.num_visible(x.shape[1], self.window)
            factor = self.log_length_scale[...][None, None] * jnp.log(n.astype(jnp.float32))[..., None]
            q = (q.astype(jnp.float32) * factor[..., None]).astype(q.dtype)
        v = self.value(x).reshape(*x.shape[:2], self.num_kv_heads, self.value_head_dim)
        sinks = self.sinks[...] if hasattr(self, "sinks") else None
        return Tokens(q, k, v, self.steps(x), self.log_gates(x), sinks)

    def _queries_and_keys(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
        B, T, D = *x.shape[:2], self.head_dim
        q, k = self.query(x), self.key(x)
        normed = hasattr(self, "query_norm")
        if normed and self.norms_all_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.reshape(B, T, self.num_heads, D), k.reshape(B, T, self.num_kv_heads, D)
        if normed and not self.norms_all_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        return q.astype(self.dtype), k.astype(self.dtype)

    @property
    def has_gates(self) -> bool:
        """Whether log gates come from parameters or constants, ALiBi under a linear kernel aside."""
        return self.attention.gate != "none"

    @property
    def has_bias(self) -> bool:
        """An additive bias is at work; under a linear kernel ALiBi is a gate instead."""
        return self.attention.has_additive_bias or (self.attention.position == "alibi" and not self.linear)

    def log_gates(self, x: Float[Array, "B T E"]) -> Float[Array, "B T G *D"] | None:
        """Float32 log gates, or None."""
        (B, T), a = x.shape[:2], self.attention
        heads = self.num_kv_heads if self.linear else self.num_heads
        log_gates = None
        if a.gate == "vector":
            numbers = ops.gates.data_log_gates(self.gate(x.astype(jnp.float32)))
            return ops.gates.plane_log_gates(numbers.reshape(B, T, heads, -1), self.rotary.num_rotated)
        if a.gate == "data":
            log_gates = ops.gates.data_log_gates(self.gate(x.astype(jnp.float32)))
        elif a.gate == "learned":
            log_gates = ops.gates.head_log_gates(self.gate_logits[...], B, T)
        elif a.gate == "fixed":
            logits = ops.gates.time_scale_logits(heads, a.gate_min_timescale, a.gate_max_timescale)
            log_gates = ops.gates.head_log_gates(jnp.asarray(logits, jnp.float32), B, T)
        if self.linear and a.position == "alibi":
            alibi = ops.gates.fixed_log_gates(heads, B, T) * self.position.alibi_slope_scale
            log_gates = alibi if log_gates is None else log_gates + alibi
        return log_gates

    def bias(self, context: Context) -> ops.PositionBias | None:
        """The additive bias of this layer, or None."""
        if not self.has_bias:
            return None
        if self.attention.position == "fire_shared":
            return context.shared_bias
        if hasattr(self, "bias_parameters"):
            return self.bias_parameters.bias()
        return fixed_bias(self.attention.position, self.num_heads, self.position)
