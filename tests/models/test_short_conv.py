"""The short convolution against its sum, and its stream against the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sympow_jax.config import layer_specs
from sympow_jax.layers.context import Context
from sympow_jax.layers.short_conv import ShortConv, causal_conv
from tests.models.small import tiny_config


def test_each_output_is_the_sum_over_the_last_inputs_of_its_document(rng):
    x, kernel = rng.normal(size=(1, 7, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    tail = rng.normal(size=(1, 3, 3)).astype(np.float32)
    ids, tail_ids = np.array([[2, 2, 2, 3, 3, 3, 3]], np.int32), np.array([[1, 2, 2]], np.int32)
    found = causal_conv(*map(jnp.asarray, (x, kernel, tail, ids, tail_ids)))
    inputs, of = np.concatenate([tail, x], 1)[0], np.concatenate([tail_ids, ids], 1)[0]
    for t in range(7):  # the input of t stands at t + 3, under the last of the four taps
        seen = [w for w in range(4) if of[t + w] == of[t + 3]]
        np.testing.assert_allclose(found[0, t], sum(kernel[w] * inputs[t + w] for w in seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gated_conv", "short_conv"])
def test_a_stream_is_the_whole_sequence(kind, rng):
    config = tiny_config("based", "attention.conv_width=4", f"attention.layer_pattern={kind}")
    layer = ShortConv(layer_specs(config)[0], config.model, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 9, 32)), jnp.float32)
    context = Context(offset=jnp.int32(0), positions=None, segment_ids=None, shared_bias=None, length=9)

    @jax.jit
    def both(x):
        whole, _ = layer(x, context)
        state, parts = layer.initial_state(2, 9), []
        for start, stop in ((0, 1), (1, 3), (3, 9)):
            out, state = layer(x[:, start:stop], context, state)
            parts.append(out)
        return whole, jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(*both(x), rtol=1e-5, atol=1e-6)
