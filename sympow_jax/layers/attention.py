"""The attention layer: one formula, a choice of kernel, position encoding and gate."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sympow_jax import ops, sharding, variants
from sympow_jax.layers import sequence_parallel
from sympow_jax.layers.context import Context
from sympow_jax.layers.kernels import linear_kernel
from sympow_jax.layers.projections import Projections
from sympow_jax.layers.state_specs import state_specs
from sympow_jax.layers.tokens import Tokens
from sympow_jax.layers.window_state import attend_window, empty_window, window_before
from sympow_jax.typing import Array, Float, PyTree


class Attention(Projections):
    """Causal attention out_i = sum_j w_ij v_j / sum_j w_ij, w_ij = kernel(q_i . k_j) exp(bias_ij) prod gates.

    q_i and k_j are projected, normalised and rotated (`Projections`, `Rotary`), then handed to the ops.
    The state of a stream is {"kernel": a finite state, or the cache of keys and values} plus the rotary phase.
    """

    def initial_state(self, batch_size: int, max_length: int) -> PyTree:
        """The empty state of a stream of at most max_length tokens (linear kernels ignore the length)."""
        B, K, D, Dv = batch_size, self.num_kv_heads, self.head_dim, self.value_head_dim
        state = {}
        if self.attention.position == "learned_rope":
            state["phase"] = ops.positions.initial_phase_state(B, *self.steps_shape)
        if self.linear:
            if self.has_bias:
                raise ValueError(
                    f"attention.position = {self.attention.position!r}: a linear kernel with an additive bias has no "
                    "finite state; evaluate it without streaming, or use a softmax kernel"
                )
            state["kernel"] = ops.empty_state(self._linear_kernel(), B, K, D, Dv)
            return state
        gate_heads = self.num_heads if self.has_gates else 0
        if self.window is None:
            state["kernel"] = ops.cache.empty_cache(B, K, max_length, D, Dv, gate_heads=gate_heads, dtype=self.dtype)
        else:
            state["kernel"] = empty_window(B, K, self.window, D, Dv, gate_heads=gate_heads, dtype=self.dtype)
        return state

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer to a sequence, or, with a state, to the next T tokens of a stream."""
        B, T, _ = x.shape
        tokens = self.tokens(x, context)
        out, state = self._attend_anywhere(tokens, self.bias(context), context, state)
        if context.softmax_share is not None and self.kernel == "power":
            out = self._blend(context.softmax_share, tokens, out, context)
        if self.attention.output_norm:
            out = self.output_norm(out).astype(out.dtype)
        out = out.reshape(B, T, self.num_heads * self.value_head_dim)
        if self.attention.output_gate:
            out = out * jax.nn.sigmoid(self.output_gate(x))
        return self.out(out), state

    def _attend_anywhere(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        attend = self._attend_on_shards if sharding.is_sharded() else self._attend
        return attend(tokens, bias, context, state)

    def _blend(
        self, share: Float[Array, ""], tokens: Tokens, out: Float[Array, "B T H Dv"], context: Context
    ) -> Float[Array, "B T H Dv"]:
        """alpha softmax + (1 - alpha) out, of the same q, k and v; softmax has the position of attention.blend_from.

        At alpha = 1 these are the bits of softmax attention.
        """
        old, row = copy.copy(self), variants.VARIANTS[self.attention.blend_from]
        old.kernel, old.linear = row.kernel, False
        form = "reference" if self.attention.implementation == "reference" else "blockwise"
        axes = {"kernel": row.kernel, "position": row.position, "gate": row.gate}
        old.attention = dataclasses.replace(self.attention, **axes, implementation=form)
        old.rotary = dataclasses.replace(self.rotary, encoding=row.position)
        bare = dataclasses.replace(tokens, beta=None, log_gates=None)
        before, _ = old._attend_anywhere(bare, None, dataclasses.replace(context, softmax_share=None), None)
        return (share * before.astype(jnp.float32) + (1 - share) * out.astype(jnp.float32)).astype(out.dtype)

    def _attend(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        """Attention of the tokens and the next state."""
        phase = None if state is None else state.get("phase")
        keep_keys = state is not None and self.rotary.changes_with_length
        tokens, scale, phase = self.rotary(tokens, context, phase, keep_keys=keep_keys)
        attend = self._attend_linear if self.linear else self._attend_softmax
        out, kernel_state = attend(tokens, scale, bias, context, state)
        if state is not None:
            state = {"kernel": kernel_state} | ({} if phase is None else {"phase": phase})
        return out, state

    def _attend_on_shards(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        """`_attend`, each device on its rows, heads and stretch of time."""
        B, T = tokens.q.shape[:2]
        time = "seq" if self._is_cut(T, context, state) else None

        def attend(tokens, sinks, bias, positions, segment_ids, offset, state):
            tokens = dataclasses.replace(tokens, sinks=sinks)
            start = offset if time is None else offset + jax.lax.axis_index("seq") * tokens.q.shape[1]
            local = dataclasses.replace(
                context, offset=start, positions=positions, segment_ids=segment_ids, shared_bias=None
            )
            between = time is not None and sharding.axis_size("seq") > 1
            return (self._attend_between_shards if between else self._attend)(tokens, bias, local, state)

        rows, states = sharding.dividing(B, sharding.BATCH), state_specs(state)
        each, heads = P(rows, time), P(rows, time, "tensor")
        cut, sinks = dataclasses.replace(tokens, sinks=None), tokens.sinks
        arguments = (cut, sinks, bias, context.positions, context.segment_ids, context.offset, state)
        specs = (heads, P("tensor"), sharding.tree_specs(bias), each, each, P(), states)
        return sharding.over_shards(attend, arguments, specs, (heads, states))

    def _is_cut(self, num_tokens: int, context: Context, state: PyTree | None) -> bool:
        """Whether the shards of a sequence share the work on its tokens, or each does all of it.

        A cache of keys is whole on every shard; softmax without one, and additive biases, work on half-shards. Where
        dynamic_ntk goes by what was read, each shard would go by its own.
        """
        shards = sharding.axis_size("seq")
        if self.rotary.changes_with_length and not context.length:
            return False
        if self.linear and not self.has_bias:
            return num_tokens % shards == 0
        if self.window is not None and self.window <= num_tokens // shards:
            return num_tokens % shards == 0
        return state is None and (shards == 1 or num_tokens % (2 * shards) == 0)

    def _attend_between_shards(
        self, tokens: Tokens, bias: ops.PositionBias | None, context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T H Dv"], PyTree | None]:
        """`_attend` on one stretch of a sequence, whose earlier tokens are on other devices."""
        streams = self.linear and not self.has_bias
        decays, past = tokens.log_gates if streams else None, state or {}
        totals = sequence_parallel.gather_totals(tokens.beta, decays, context.segment_ids)
        phase = None
        if tokens.beta is not None:
            phase = sequence_parallel.phase_before(totals, past.get("phase"))
        keep_keys = state is not None and self.rotary.changes_with_length
        tokens, scale, phase = self.rotary(tokens, context, phase, keep_keys=keep_keys)
        options: dict[str, Any] = {"scale": scale, "implementation": self._implementation()}
        if self.linear and not streams:
            ring = functools.partial(ops.linear_attention_ring, self._linear_kernel())
            size = self.attention.chunk_size or None
            return sequence_parallel.attend_ring(ring, tokens, bias, context, scale=scale, block_size=size), None
        if streams:
            kernel = self._linear_kernel()
            known: dict[str, Any] = {"log_gates": tokens.log_gates, "segment_ids": context.segment_ids}
            known |= {"chunk_size": self.attention.chunk_size or None}
            form = options["implementation"]
            own = ops.state_of(kernel, tokens.k, tokens.v, implementation=form, **known)
            before = sequence_parallel.state_before(kernel, totals, own, past.get("kernel"))
            out, after = ops.linear_attention_with_state(
                kernel, tokens.q, tokens.k, tokens.v, initial_state=before, **known, **options
            )
        elif state is not None:
            positions = jnp.broadcast_to(context.token_positions(tokens.q.shape[1]), tokens.q.shape[:2])
            before = window_before(tokens, positions, state["kernel"])
            out, after = self._attend_softmax(tokens, scale, bias, context, {"kernel": before})
        elif self.window is not None and self.window <= tokens.q.shape[1]:
            return sequence_parallel.attend_window(tokens, bias, context, window=self.window, **options), None
        else:
            return sequence_parallel.attend(tokens, bias, context, window=self.window, **options), None
        if state is None:
            return out, None
        if phase is None:
            return out, sharding.from_last({"kernel": after})
        phase = phase if past["phase"].twin is not None else dataclasses.replace(phase, twin=None)
        return out, sharding.from_last({"kernel": after, "phase": phase})

    def kernel_inputs(self, x: Float[Array, "B T E"], context: Context) -> tuple[Array, Array, Array | None, float]:
        """(q, k, log_gates, scale) as the kernel gets them from whole sequences, rotary positions applied."""
        tokens, scale, _ = self.rotary(self.tokens(x, context), context, None)
        return tokens.q, tokens.k, tokens.log_gates, scale

    def _implementation(self) -> str | None:
        """None, let the op choose, for "auto"."""
        return None if self.attention.implementation == "auto" else self.attention.implementation

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
        options |= {"implementation": a.implementation if a.is_linear_form or a.implementation == "reference" else None}
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
            options |= {"sinks": tokens.sinks, "segment_ids": context.segment_ids, "positions": context.positions}
            return ops.softmax_attention(q, k, v, log_gates=log_gates, **options), None
        if context.segment_ids is not None:
            raise ValueError(
                "segment_ids with a softmax state: a cache holds one document; stream documents one by one"
            )
        B, T = q.shape[:2]
        positions = jnp.broadcast_to(context.token_positions(T), (B, T))
        rotate = functools.partial(self.rotary.rotate_cached, context=context, num_tokens=T)
        rotate = rotate if self.rotary.changes_with_length else None
        options = {"positions": positions, "bias": bias, "scale": scale, "rotate_keys": rotate}
        if self.window is not None:
            return attend_window(tokens, state["kernel"], window=self.window, **options)
        offset = context.offset
        cache = ops.cache.append(state["kernel"], k, v, log_gates=log_gates, positions=positions, offset=offset)
        return ops.cache.cached_attention(q, cache, offset=offset, sinks=tokens.sinks, **options), cache
