"""Causal softmax attention with gates, additive position biases, windows, packed documents and caches."""

from sympow_jax.ops.softmax_attention.api import softmax_attention, softmax_attention_at, softmax_attention_ring

__all__ = ["softmax_attention", "softmax_attention_at", "softmax_attention_ring"]
