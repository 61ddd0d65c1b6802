"""Short causal depthwise convolutions, the local layers of the Based and ReBased hybrids."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sympow_jax import sharding
from sympow_jax.config import LayerSpec, ModelConfig
from sympow_jax.layers.context import Context
from sympow_jax.layers.linear import make_linear
from sympow_jax.layers.state_specs import state_specs
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


def _document_ids(u: Float[Array, "B T F"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    return jnp.ones(u.shape[:2], jnp.int32) if segment_ids is None else segment_ids


def _empty(batch_size: int, width: int, features: int) -> PyTree:
    shape = (batch_size, width)
    return {"tail": jnp.zeros((*shape, features)), "segment_ids": jnp.zeros(shape, jnp.int32)}


class ShortConv(nnx.Module):
    """A convolution layer of width W with the state of a stream: its last W - 1 inputs.

    gated_conv (Based, arXiv 2402.18668): out(silu(conv(u)) * g), [u, g] = in(x), inner width conv_expand * E / 2.
    short_conv (ReBased's BaseConv, arXiv 2402.10644): x + conv(x) * W x.
    """

    def __init__(self, spec: LayerSpec, model: ModelConfig, *, rngs: nnx.Rngs):
        self.gated = spec.mixer == "gated_conv"
        self.width = spec.attention.conv_width
        self.inner_dim = spec.attention.conv_expand * model.embed_dim // 2 if self.gated else model.embed_dim
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
        return _empty(batch_size, self.width - 1, self.inner_dim)

    def __call__(
        self, x: Float[Array, "B T E"], context: Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Applies the layer; with a state, continues from it and returns the next."""
        u, gate = jnp.split(self.input(x), 2, axis=-1) if self.gated else (x, self.multiplier(x))
        convolve = self._on_shards if sharding.is_sharded() else self._convolve
        conv, state = convolve(u, self.kernel[...], context.segment_ids, state)
        out = self.out(jax.nn.silu(conv) * gate) if self.gated else x + conv * gate
        return out, state

    def _convolve(
        self, u: Array, kernel: Array, segment_ids: Array | None, state: PyTree | None
    ) -> tuple[Array, PyTree | None]:
        """causal_conv after the state, and the next one when one is given."""
        before = state or _empty(u.shape[0], self.width - 1, u.shape[2])
        conv = causal_conv(u, kernel, before["tail"], segment_ids, before["segment_ids"])
        if state is None:
            return conv, None
        new = {"tail": u.astype(jnp.float32), "segment_ids": _document_ids(u, segment_ids)}
        return conv, {n: jnp.concatenate([before[n], x], axis=1)[:, -(self.width - 1) :] for n, x in new.items()}

    def _on_shards(
        self, u: Array, kernel: Array, segment_ids: Array | None, state: PyTree | None
    ) -> tuple[Array, PyTree | None]:
        """`_convolve`, each device on its rows, features and stretch of time, after the inputs just before that."""
        shards, width = sharding.axis_size("seq"), self.width - 1
        is_cut = u.shape[1] % shards == 0 and u.shape[1] // shards >= width

        def convolve(u, kernel, ids, state):
            if not is_cut:
                return self._convolve(u, kernel, ids, state)
            past = state or {"tail": None, "segment_ids": None}
            tail = sharding.halo(u, width, past["tail"]).astype(jnp.float32)
            tail_ids = sharding.halo(_document_ids(u, ids), width, past["segment_ids"])
            conv, after = self._convolve(u, kernel, ids, {"tail": tail, "segment_ids": tail_ids})
            return conv, None if state is None else sharding.from_last(after)

        rows, time = sharding.dividing(u.shape[0], sharding.BATCH), "seq" if is_cut else None
        features, states = P(rows, time, "tensor"), state_specs(state)
        specs = (features, P(None, "tensor"), P(rows, time), states)
        return sharding.over_shards(convolve, (u, kernel, segment_ids, state), specs, (features, states))
