"""The hand-over of softmax attention to the kernels JAX ships: same results here, and the same program there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.softmax_attention import accelerators
from sympow_jax.ops.softmax_attention.api import fill_in
from sympow_jax.ops.softmax_attention.dispatch import choose as choose_implementation
from sympow_jax.ops.softmax_attention.reference import reference

IDS = np.repeat([[1, 2, 0, 3]], [100, 60, 30, 66], axis=1).astype(np.int32)


def make_arrays(dtype=jnp.float32, T=256):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, T, heads, 16)), dtype) for heads in (4, 2, 2)]


def make_inputs(q, k, v, segment_ids=None, **changes):
    options = {"log_gates": None, "bias": None, "positions": None, "key_positions": None} | changes
    return fill_in(q, k, v, segment_ids=segment_ids, **options)


def values_and_gradients(form, segment_ids):
    def loss(q, k, v):
        out = form(make_inputs(q, k, v, segment_ids), scale=0.25)
        return (out * jnp.cos(out)).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*make_arrays())


@pytest.mark.parametrize(
    ("form", "segment_ids"),
    [
        pytest.param(functools.partial(accelerators.splash, interpret=True), IDS, id="splash"),
        pytest.param(functools.partial(accelerators.cudnn, implementation="xla"), None, id="dot_product_attention"),
    ],
)
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_shipped_kernels_are_the_reference(form, segment_ids, window):
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    actual = values_and_gradients(functools.partial(form, window=window), ids)
    expected = values_and_gradients(functools.partial(reference, window=window), ids)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=3e-5)
    if ids is not None:
        np.testing.assert_array_equal(actual[0][1][ids == 0], 0)


def test_a_tpu_gets_splash_attention(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    gradient = jax.jit(jax.grad(lambda q, k, v: ops.softmax_attention(q, k, v, segment_ids=jnp.asarray(IDS)).sum()))
    with compiling_for("tpu"):
        lowered = gradient.trace(*make_arrays()).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") in (2, 3)  # forward and backward, in one kernel or two


def chosen(platform, dtype=jnp.bfloat16, T=256, segment_ids=None, cached=False, **changes):
    names = []

    def choose(q, k, v):
        names.append(choose_implementation(None, make_inputs(q, k, v, segment_ids, **changes), None, cached=cached))

    with compiling_for(platform):
        jax.eval_shape(choose, *make_arrays(dtype, T))
    return names[0]


def test_each_platform_takes_its_kernel_where_it_can(monkeypatch):
    assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == ["blockwise"] * 3  # no GPU, and many devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (chosen("gpu"), chosen("tpu")) == ("cudnn", "pallas")
    gates = {"log_gates": jnp.zeros((1, 256, 2))}  # of two kv heads for four heads
    bias = {"bias": ops.positions.sandwich_bias(4)}
    for refused in (gates, bias, {"cached": True}, {"sinks": jnp.zeros(4)}):
        assert chosen("gpu", **refused) == chosen("tpu", **refused) == "blockwise"
    assert chosen("gpu", jnp.float32) == chosen("gpu", segment_ids=jnp.asarray(IDS)) == "blockwise"
    assert chosen("tpu", segment_ids=jnp.asarray(IDS)) == "pallas"
    assert chosen("tpu", T=200) == "blockwise"


@pytest.mark.parametrize(("name", "reason"), [("cudnn", "needs a GPU"), ("pallas", "needs a TPU")])
def test_a_kernel_that_cannot_run_here_says_why(name, reason):
    with pytest.raises(ValueError, match=f"implementation='{name}'.*{reason}.*'blockwise'"):
        ops.softmax_attention(*make_arrays(), implementation=name)
