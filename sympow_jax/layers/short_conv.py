"""Short causal depthwise convolutions, the local layers of the Based and ReBased hybrids."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.config import AttentionConfig, ModelConfig
from sympow_jax.layers.context import Context
from sympow_jax.layers.linear import make_linear
from sympow_jax.typing import Array, Float, Int, PyTree


def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    tail: Float[Array, "B W1 F"],
    segment_ids: Int[Array, "B T"] | None,
    tail_ids: Int[Array, "B W1"],
) -> Float[Array, "B T F"]:
    """y_t = sum_w kernel_w * x_(t - W + 1 + w), over taps of the same document only.

    `tail` holds the W - 1 inputs before x (zeros at the start of a stream), `tail_ids` their segment ids.
    """
    T, W = x.shape[1], kernel.shape[0]
    padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    taps = [padded[:, w : w + T] for w in range(W)]
    if segment_ids is not None:
        ids = jnp.concatenate([tail_ids, segment_ids], axis=1)
        taps = [jnp.where((ids[:, w : w + T] == segment_ids)[..., None], tap, 0) for w, tap in enumerate(taps)]
    weights = kernel.astype(x.dtype)[:, None, None, :]
    return functools.reduce(jnp.add, (tap * weight for tap, weight in zip(taps, weights, strict=True)))


class ShortConv(nnx.Module):
    """A convolution layer of width W with the state of a stream: its last W - 1 inputs.

    gated_conv (Based, arXiv 2402.18668): out(silu(conv(u)) * g), [u, g] = in(x), inner width conv_expand * E / 2.
    short_conv (ReBased's BaseConv, arXiv 2402.10644): x + conv(x) * W x.
    """

    def __init__(self, kind: str, model: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.gated = kind == "gated_conv"
        self.width = attention.conv_width
        self.inner_dim = attention.conv_expand * model.embed_dim // 2 if self.gated else model.embed_dim
        if self.gated:
            self.input = make_linear(model, model.embed_dim, 2 * self.inner_dim, bias=True, rngs=rngs)
            self.out = make_linear(model, self.inner_dim, model.embed_dim, bias=True, residual=True, rngs=rngs)
        else:
            self.multiplier = make_linear(model, model.embed_dim, model.embed_dim, rngs=rngs)
        bound = self.width**-0.5  # the uniform bound of a depthwise convolution with `width` inputs
        init = jax.random.uniform(rngs.params(), (self.width, self.inner_dim), minval=-bound, maxval=bound)
        self.kernel = nnx.Param(init)

    def initial_state(self, batch_size: int, max_length: int) -> PyTree:
        """Zeros: [B, W - 1, F] inputs, and the segment ids of their documents."""
        del max_length
        shape = (batch_size, self.width - 1)
        return {"tail": jnp.zeros((*shape, self.inner_dim)), "segment_ids": jnp.zeros(shape, jnp.int32)}

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer; with a state, continues from it and returns the next."""
        u, gate = jnp.split(self.input(x), 2, axis=-1) if self.gated else (x, self.multiplier(x))
        past = state or self.initial_state(x.shape[0], 0)
        if state is None and sharding.is_sharded():
            conv = self._conv_on_shards(u, context.segment_ids)
        else:
            conv = causal_conv(u, self.kernel[...], past["tail"], context.segment_ids, past["segment_ids"])
        out = self.out(jax.nn.silu(conv) * gate) if self.gated else x + conv * gate
        return out, None if state is None else self._next_state(u, context, past)

    def _conv_on_shards(self, u: Array, segment_ids: Array | None) -> Array:
        """causal_conv, each device on its rows, features and stretch of time, after the inputs just before that."""

        def conv(u, kernel, ids):
            tail_ids = sharding.halo(jnp.zeros(u.shape[:2], jnp.int32) if ids is None else ids, self.width - 1)
            return causal_conv(u, kernel, sharding.halo(u, self.width - 1), ids, tail_ids)

        rows, features = P(sharding.BATCH, "seq"), P(sharding.BATCH, "seq", "tensor")
        specs = (features, P(None, "tensor"), rows)
        return sharding.over_shards(conv, (u, self.kernel[...], segment_ids), specs, features)

    def _next_state(self, u: Array, context: Context, past: PyTree) -> PyTree:
        ids = jnp.ones(u.shape[:2], jnp.int32) if context.segment_ids is None else context.segment_ids
        keep = self.width - 1
        return {
            "tail": jnp.concatenate([past["tail"], u.astype(jnp.float32)], axis=1)[:, -keep:],
            "segment_ids": jnp.concatenate([past["segment_ids"], ids], axis=1)[:, -keep:],
        }
