"""The attention layer: one formula, a choice of kernel, position encoding and gate."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sympow_jax import ops, sharding, variants
from sympow_jax.config import AttentionConfig, ModelConfig, PositionConfig
from sympow_jax.layers import sequence_parallel
from sympow_jax.layers.context import Context
from sympow_jax.layers.kernels import linear_kernel
from sympow_jax.layers.linear import make_linear
from sympow_jax.layers.position_bias import BiasParameters, fixed_bias
from sympow_jax.layers.tokens import Tokens
from sympow_jax.typing import Array, Float, Int, PyTree


def qk_head_dim(kind: str, model: ModelConfig, attention: AttentionConfig) -> int:
    """head_dim of queries and keys of a layer; a window layer is softmax whatever the kernel."""
    return attention.feature_dim if kind == "attention" and attention.uses_feature_dim else model.head_dim


class Attention(nnx.Module):
    """Causal attention out_i = sum_j w_ij v_j / sum_j w_ij, w_ij = kernel(q_i . k_j) exp(bias_ij) prod gates.

    Parameters: query [E, H D], key [E, K D], value [E, K Dv], out [H Dv, E]; and, as the variant needs them, gate
    [E, G] with bias (data) or gate_logits [G] (learned), beta [E, K] (learned_rope), bias_parameters (kerple, t5,
    fire), query_norm and key_norm (qk_norm, rebased), output_gate [E, H Dv]. G is H under softmax, else K.

    The state of a stream is {"kernel": a finite state, or the cache of keys and values} plus the rotary phase.
    """

    def __init__(
        self, kind: str, model: ModelConfig, attention: AttentionConfig, position: PositionConfig, *, rngs: nnx.Rngs
    ):
        self.kernel = "softmax" if kind == "window" else attention.kernel
        self.window = attention.window if kind == "window" else None
        self.linear = attention.is_linear and kind != "window"
        self.attention, self.position = attention, position
        self.num_heads, self.num_kv_heads = model.num_heads, model.num_kv_heads
        self.head_dim, self.value_head_dim = qk_head_dim(kind, model, attention), model.head_dim
        self.dtype = model.dtype
        E, H, K, D, Dv = model.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.value_head_dim
        self.query = make_linear(model, E, H * D, rngs=rngs)
        self.key = make_linear(model, E, K * D, rngs=rngs)
        self.value = make_linear(model, E, K * Dv, rngs=rngs)
        self.out = make_linear(model, H * Dv, E, residual=True, rngs=rngs)
        if attention.output_gate:
            self.output_gate = make_linear(model, E, H * Dv, rngs=rngs)
        self._make_norms(rngs)
        self._make_gate(model, rngs)
        if attention.position == "learned_rope":
            self.beta = make_linear(model, E, K, dtype="float32", rngs=rngs)
        if attention.position in variants.LEARNED_BIASES:
            self.bias_parameters = BiasParameters(attention.position, H, rngs=rngs)

    def _make_norms(self, rngs: nnx.Rngs) -> None:
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        if self.kernel == "rebased":
            whole = self.attention.rebased_norm == "concatenated"
            self.query_norm = nnx.LayerNorm(H * D if whole else D, epsilon=1e-5, rngs=rngs)
            self.key_norm = nnx.LayerNorm(K * D if whole else D, epsilon=1e-5, rngs=rngs)
        elif self.attention.qk_norm:
            self.query_norm = nnx.RMSNorm(D, epsilon=1e-6, rngs=rngs)
            self.key_norm = nnx.RMSNorm(D, epsilon=1e-6, rngs=rngs)

    def _make_gate(self, model: ModelConfig, rngs: nnx.Rngs) -> None:
        a, heads = self.attention, self.num_kv_heads if self.linear else self.num_heads
        initial = {
            "zero": jnp.zeros(heads),
            "long": jnp.full(heads, ops.gates.POWER_GATE_BIAS, jnp.float32),
            "timescales": jnp.asarray(
                ops.gates.time_scale_logits(heads, a.gate_min_timescale, a.gate_max_timescale), jnp.float32
            ),
        }[a.gate_init]
        if a.gate == "data":
            self.gate = make_linear(model, model.embed_dim, heads, bias=True, dtype="float32", rngs=rngs)
            self.gate.bias = nnx.Param(initial)
        elif a.gate == "learned":
            self.gate_logits = nnx.Param(initial)

    def initial_state(self, batch_size: int, max_length: int) -> PyTree:
        """The empty state of a stream of at most max_length tokens (linear kernels ignore the length)."""
        B, K, D, Dv = batch_size, self.num_kv_heads, self.head_dim, self.value_head_dim
        state = {}
        if self.attention.position == "learned_rope":
            state["phase"] = ops.positions.initial_phase_state(B, K)
        if self.linear:
            if self._has_bias():
                raise ValueError(
                    f"attention.position = {self.attention.position!r}: a linear kernel with an additive bias has no "
                    "finite state; evaluate it without streaming, or use a softmax kernel"
                )
            state["kernel"] = ops.empty_state(self._linear_kernel(), B, K, D, Dv)
            return state
        if self.window is None:
            gate_heads = self.num_heads if self._has_gates() else 0
            state["kernel"] = ops.cache.empty_cache(B, K, max_length, D, Dv, gate_heads=gate_heads, dtype=self.dtype)
            return state
        state["kernel"] = {
            "keys": jnp.zeros((B, self.window, K, D), self.dtype),
            "values": jnp.zeros((B, self.window, K, Dv), self.dtype),
            "positions": jnp.full((B, self.window), -1, jnp.int32),
        }
        if self._has_gates():
            state["kernel"]["log_gates"] = jnp.zeros((B, self.window, self.num_heads), jnp.float32)
        return state

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer to a sequence, or, with a state, to the next T tokens of a stream."""
        B, T, _ = x.shape
        tokens = self._tokens(x)
        if state is None and sharding.is_sharded():
            out = self._attend_on_shards(tokens, context)
        else:
            out, state = self._attend(tokens, self.bias(context), context, state)
        out = out.reshape(B, T, self.num_heads * self.value_head_dim)
        if self.attention.output_gate:
            out = out * jax.nn.sigmoid(self.output_gate(x))
        return self.out(out), state

    def _attend(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        """Attention of the tokens and the next state."""
        phase = None if state is None else state.get("phase")
        keep_keys = state is not None and self._caches_unrotated()
        tokens, scale, phase = self._rotate(tokens, context, phase, keep_keys=keep_keys)
        attend = self._attend_linear if self.linear else self._attend_softmax
        out, kernel_state = attend(tokens, scale, bias, context, state)
        if state is not None:
            state = {"kernel": kernel_state} | ({} if phase is None else {"phase": phase})
        return out, state

    def _attend_on_shards(self, tokens: Tokens, context: Context) -> Float[Array, "B T H Dv"]:
        """`_attend` without a state, each device on its rows, heads and stretch of time."""

        def attend(tokens, bias, positions, segment_ids):
            start = jax.lax.axis_index("seq") * tokens.q.shape[1]
            local = dataclasses.replace(
                context, offset=start, positions=positions, segment_ids=segment_ids, shared_bias=None
            )
            if sharding.axis_size("seq") > 1:
                return self._attend_between_shards(tokens, bias, local)
            return self._attend(tokens, bias, local, None)[0]

        bias = self.bias(context)
        rows, heads = P(sharding.BATCH, "seq"), P(sharding.BATCH, "seq", "tensor")
        arguments = (tokens, bias, context.positions, context.segment_ids)
        return sharding.over_shards(attend, arguments, (heads, sharding.tree_specs(bias), rows, rows), heads)

    def _attend_between_shards(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context
    ) -> Float[Array, "B T H Dv"]:
        """`_attend` on one stretch of a sequence, whose earlier tokens are on other devices."""
        decays = tokens.log_gates if self.linear else None
        totals = sequence_parallel.gather_totals(tokens.beta, decays, context.segment_ids)
        phase = None
        if tokens.beta is not None:
            phase, beta = sequence_parallel.phase_before(totals, tokens.beta)
            tokens = dataclasses.replace(tokens, beta=beta)
        tokens, scale, _ = self._rotate(tokens, context, phase)
        options: dict[str, Any] = {"scale": scale, "implementation": self._implementation()}
        if self.linear:
            kernel = self._linear_kernel()
            known: dict[str, Any] = {"log_gates": tokens.log_gates, "segment_ids": context.segment_ids}
            known |= {"chunk_size": self.attention.chunk_size or None}
            form = options["implementation"]
            own = ops.state_of(kernel, tokens.k, tokens.v, implementation=form, **known)
            before = sequence_parallel.state_before(totals, own)
            return ops.linear_attention_with_state(
                kernel, tokens.q, tokens.k, tokens.v, initial_state=before, **known, **options
            )[0]
        if self.window is not None and self.window <= tokens.q.shape[1]:
            return sequence_parallel.attend_window(tokens, bias, context, window=self.window, **options)
        return sequence_parallel.attend_gathered(tokens, bias, context, window=self.window, **options)

    def kernel_inputs(self, x: Float[Array, "B T E"], context: Context) -> tuple[Array, Array, Array | None, float]:
        """(q, k, log_gates, scale) as the kernel gets them from whole sequences, rotary positions applied."""
        tokens, scale, _ = self._rotate(self._tokens(x), context, None)
        return tokens.q, tokens.k, tokens.log_gates, scale

    def _tokens(self, x: Float[Array, "B T E"]) -> Tokens:
        """What the kernel needs of each token apart from its position."""
        q, k = self._queries_and_keys(x)
        v = self.value(x).reshape(*x.shape[:2], self.num_kv_heads, self.value_head_dim)
        beta = 1.0 + jnp.tanh(self.beta(x.astype(jnp.float32))) if hasattr(self, "beta") else None
        return Tokens(q, k, v, beta, self.log_gates(x))

    def _queries_and_keys(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
        B, T, D = *x.shape[:2], self.head_dim
        q, k = self.query(x), self.key(x)
        if self.kernel == "rebased" and self.attention.rebased_norm == "concatenated":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.reshape(B, T, self.num_heads, D), k.reshape(B, T, self.num_kv_heads, D)
        per_head = self.attention.qk_norm or self.attention.rebased_norm == "head"
        if hasattr(self, "query_norm") and per_head:
            q, k = self.query_norm(q), self.key_norm(k)
        return q.astype(self.dtype), k.astype(self.dtype)

    def _rotate(
        self, tokens: Tokens, context: Context, phase: ops.positions.PhaseState | None, *, keep_keys: bool = False
    ) -> tuple[Tokens, float, ops.positions.PhaseState | None]:
        """Rotary encodings; returns the rotated tokens, the scale of the scores, and the next phase state."""
        scale, T = 1 / math.sqrt(self.head_dim), tokens.q.shape[1]
        if self.attention.position not in variants.ROTARY_POSITIONS:
            return tokens, scale, None
        frequencies, factor = self._frequencies(context, T)
        if self.attention.position == "rope":
            phases, next_phase = ops.positions.rope_phases(context.token_positions(T), frequencies), None
        else:
            assert tokens.beta is not None  # the layer of learned_rope has one
            phases, next_phase = ops.positions.learned_phases(
                tokens.beta, frequencies, initial=phase, segment_ids=context.segment_ids
            )
        k = tokens.k if keep_keys else ops.positions.rotate(tokens.k, phases)
        rotated = dataclasses.replace(tokens, q=ops.positions.rotate(tokens.q, phases), k=k)
        return rotated, scale * factor**2, next_phase

    def _frequencies(self, context: Context, num_tokens: int) -> tuple[Any, float]:
        length = context.length or context.offset + num_tokens
        return rotary_frequencies(self.head_dim, self.position, length)

    def _caches_unrotated(self) -> bool:
        """Keys of a stream are kept as they were before RoPE, because its frequencies change as the stream grows."""
        return self.attention.position == "rope" and self.position.scaling == "dynamic_ntk"

    def _rotate_cached(self, k: Array, positions: Array, context: Context, num_tokens: int) -> Array:
        """Rotates keys [B, K, S, D] of a cache by the frequencies of the present length."""
        frequencies, _ = self._frequencies(context, num_tokens)
        phases = ops.positions.rope_phases(positions, frequencies)
        return ops.positions.rotate(k.swapaxes(1, 2), phases).swapaxes(1, 2)

    def _has_gates(self) -> bool:
        return self.attention.gate != "none"

    def _has_bias(self) -> bool:
        """An additive bias is at work; under a linear kernel ALiBi is a gate instead."""
        return self.attention.has_additive_bias or (self.attention.position == "alibi" and not self.linear)

    def log_gates(self, x: Array) -> Array | None:
        """[B, T, G] float32 log gates, or None."""
        (B, T), a = x.shape[:2], self.attention
        heads = self.num_kv_heads if self.linear else self.num_heads
        log_gates = None
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
        if not self._has_bias():
            return None
        if self.attention.position == "fire_shared":
            return context.shared_bias
        if hasattr(self, "bias_parameters"):
            return self.bias_parameters.bias()
        return fixed_bias(self.attention.position, self.num_heads, self.position)

    def _implementation(self) -> str | None:
        """None (let the op choose) for "auto", and for the softmax layers beside a linear form."""
        a = self.attention
        return None if a.implementation == "auto" or (a.is_linear_form and not self.linear) else a.implementation

    def _linear_kernel(self) -> ops.Kernel:
        return linear_kernel(self.kernel, degree=self.attention.degree)

    def _attend_linear(
        self,
        tokens: Tokens,
        scale: float,
        bias: ops.PositionBias | None,
        context: Context,
        state: PyTree | None,
    ) -> tuple[Float[Array, "B T H Dv"], ops.LinearState | None]:
        kernel, a = self._linear_kernel(), self.attention
        options: dict[str, Any] = {"log_gates": tokens.log_gates, "scale": scale}
        if state is not None and tokens.q.shape[1] == 1 and context.segment_ids is None:
            return ops.linear_step(kernel, state["kernel"], q=tokens.q, k=tokens.k, v=tokens.v, **options)
        options |= {"segment_ids": context.segment_ids, "chunk_size": a.chunk_size or None}
        if state is None:
            options |= {"bias": bias, "positions": context.positions, "implementation": self._implementation()}
            return ops.linear_attention(kernel, tokens.q, tokens.k, tokens.v, **options), None
        options |= {"implementation": a.implementation if a.is_linear_form else None}
        return ops.linear_attention_with_state(
            kernel, tokens.q, tokens.k, tokens.v, initial_state=state["kernel"], **options
        )

    def _attend_softmax(
        self,
        tokens: Tokens,
        scale: float,
        bias: ops.PositionBias | None,
        context: Context,
        state: PyTree | None,
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        q, k, v, log_gates = tokens.q, tokens.k, tokens.v, tokens.log_gates
        if state is None:
            options = {"bias": bias, "scale": scale, "window": self.window, "implementation": self._implementation()}
            options |= {"segment_ids": context.segment_ids, "positions": context.positions}
            return ops.softmax_attention(q, k, v, log_gates=log_gates, **options), None
        if context.segment_ids is not None:
            raise ValueError(
                "segment_ids with a softmax state: a cache holds one document; stream documents one by one"
            )
        B, T = q.shape[:2]
        positions = jnp.broadcast_to(context.token_positions(T), (B, T))
        rotate = functools.partial(self._rotate_cached, context=context, num_tokens=T)
        rotate = rotate if self._caches_unrotated() else None
        if self.window is not None:
            return self._attend_window(tokens, scale, bias, positions, rotate, state["kernel"])
        offset = context.offset
        cache = ops.cache.append(state["kernel"], k, v, log_gates=log_gates, positions=positions, offset=offset)
        options = {"positions": positions, "offset": offset, "bias": bias, "scale": scale, "rotate_keys": rotate}
        return ops.cache.cached_attention(q, cache, **options), cache

    def _attend_window(
        self,
        tokens: Tokens,
        scale: float,
        bias: ops.PositionBias | None,
        positions: Int[Array, "B T"],
        rotate: Callable[[Array, Array], Array] | None,
        past: PyTree,
    ) -> tuple[Float[Array, "B T H Dv"], PyTree]:
        q, v = tokens.q, tokens.v
        new = {"keys": tokens.k, "values": v, "positions": positions}
        new |= {} if tokens.log_gates is None else {"log_gates": tokens.log_gates}
        visible = {n: jnp.concatenate([old, new[n].astype(old.dtype)], 1) for n, old in past.items()}
        keys = visible["keys"].astype(q.dtype)
        if rotate is not None:
            keys = rotate(keys.swapaxes(1, 2), visible["positions"]).swapaxes(1, 2)
        out = ops.softmax_attention(
            q,
            keys,
            visible["values"].astype(v.dtype),
            log_gates=visible.get("log_gates"),
            bias=bias,
            scale=scale,
            positions=positions,
            key_positions=visible["positions"],
            window=self.window,
        )
        return out, {name: array[:, q.shape[1] :] for name, array in visible.items()}


def rotary_frequencies(head_dim: int, position: PositionConfig, length: int | Array) -> tuple[Any, float]:
    """inv_freq [D/2] and attention factor of the configured RoPE, at a context of `length` tokens."""
    if position.convention == "manifest":
        return ops.positions.manifest_frequencies(head_dim, position.max_length), 1.0
    return ops.positions.rope_frequencies(
        head_dim,
        base=position.base,
        scaling=None if position.scaling == "none" else position.scaling,
        factor=position.factor,
        original_length=position.original_length,
        length=length,
    )
