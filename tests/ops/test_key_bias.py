"""ALiBi and gates in the dims of queries and keys: as exact as bfloat16 attention, and what a GPU is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.softmax_attention import accelerators, key_bias
from sympow_jax.ops.softmax_attention.api import fill_in
from sympow_jax.ops.softmax_attention.dispatch import choose
from tests.tolerances import assert_bfloat16

SLOPES = ops.positions.alibi_slopes(12)[[0, 7, 8, 11]]  # 12 heads have slopes that are no powers of two


def inputs(q, k, v, positions=None):
    bias = ops.positions.alibi_bias(jnp.asarray(SLOPES, jnp.float32))
    return fill_in(q, k, v, log_gates=None, bias=bias, segment_ids=None, positions=positions, key_positions=None)


def arrays(T, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, T, heads, 16)), dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize(("T", "start"), [(4_096, 0), (65_536, 0), (65_536, 1_000_000), (1_048_576, 0)])
def test_logits_of_a_row_have_the_rounding_of_one_float32_sum(T, start):
    """Of the last row, up to what its keys share, relative to the steepest slope's largest bias."""
    q = jnp.zeros((1, 1, 4, 16), jnp.bfloat16)
    k = jnp.zeros((1, T, 1, 16), jnp.bfloat16)
    x = inputs(q, k, k, positions=start + jnp.arange(T, dtype=jnp.int32))
    q, k = key_bias.folded(x, scale=0.25)
    logits = 0.25 * np.asarray(jnp.einsum("he,je->hj", q[0, 0], k[0, :, 0], preferred_element_type=jnp.float32))
    error = (logits - logits[:, -1:]) - SLOPES[:, None] * (np.arange(T) - (T - 1.0))
    assert np.abs(error).max() <= 2.0**-22 * T * SLOPES.max()


def gated(q, k, v, log_gates):
    return fill_in(q, k, v, log_gates, bias=None, segment_ids=None, positions=None, key_positions=None)


def forgetting(T, least, dtype=jnp.bfloat16):
    """Queries, keys and values of four heads each, and log gates from 0 down to `least`, a head its own range."""
    rng = np.random.default_rng(1)
    log_gates = least * rng.random((1, T, 4)) * np.asarray([1e-3, 1e-2, 0.1, 1])
    return *(jnp.asarray(rng.normal(size=(1, T, 4, 16)), dtype) for _ in range(3)), jnp.asarray(log_gates, jnp.float32)


def folded_gates(q, k, v, log_gates, window=None):
    return accelerators.cudnn(gated(q, k, v, log_gates), scale=0.25, window=window, block_size=64, implementation="xla")


def tiles(q, k, v, log_gates, window=None):
    options = {"window": window, "scale": 0.25, "implementation": "blockwise", "block_size": 64}
    return ops.softmax_attention(q, k, v, log_gates=log_gates, **options)


@pytest.mark.parametrize("window", [None, pytest.param(100, marks=pytest.mark.slow)])
def test_gates_of_a_call_without_gradients_are_as_good_as_a_float32_bias(window):
    arrays = forgetting(320, least=-180.0)  # sums of 30,000
    assert 2**14 < key_bias.largest_sum(gated(*arrays)) < key_bias.LARGEST_SUM
    with jax.numpy_dtype_promotion("standard"):
        test = folded_gates(*arrays, window=window)
    with jax.enable_x64(True):
        gold = tiles(*(a.astype(jnp.float64) for a in arrays), window=window)
    assert_bfloat16(test, tiles(*arrays, window=window), gold)


def test_gates_with_a_gradient_or_with_sums_too_large_to_fold_are_blockwise():
    def results(form, *arrays):
        out, vjp = jax.vjp(form, *arrays)
        return out, *vjp(jnp.cos(out))

    with jax.numpy_dtype_promotion("standard"):
        arrays = forgetting(128, least=-10.0)
        for found, expected in zip(results(folded_gates, *arrays), results(tiles, *arrays), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert not np.array_equal(folded_gates(*arrays), tiles(*arrays))
        arrays = forgetting(128, least=-600.0)
        assert key_bias.largest_sum(gated(*arrays)) > key_bias.LARGEST_SUM
        np.testing.assert_array_equal(folded_gates(*arrays), tiles(*arrays))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
def test_values_and_gradients_are_as_good_as_those_of_a_float32_bias(window):
    def results(form, dtype):
        def attend(q, k, v):
            return form(inputs(q, k, v), scale=0.25, window=window)

        out, vjp = jax.vjp(attend, *(a.astype(dtype) for a in arrays(320)))
        return [np.asarray(a, np.float64) for a in (out, *vjp(jnp.cos(3 * out.astype(jnp.float32)).astype(dtype)))]

    def fold(x, **options):
        return accelerators.cudnn(x, implementation="xla", **options)

    def bias(x, *, scale, window):
        local = None if window is None else (window - 1, 0)
        bias = x.bias(x.q_positions, x.k_positions)[None]
        return jax.nn.dot_product_attention(x.q, x.k, x.v, bias, scale=scale, is_causal=True, local_window_size=local)

    def blockwise(x, **options):
        return ops.softmax_attention(x.q, x.k, x.v, bias=x.bias, implementation="blockwise", **options)

    with jax.numpy_dtype_promotion("standard"):  # as JAX's own form needs it
        test, reference = results(fold, jnp.bfloat16), results(bias, jnp.bfloat16)
    with jax.enable_x64(True):
        gold = results(blockwise, jnp.float64)
    for name, *found in zip(("out", "dq", "dk", "dv"), test, reference, gold, strict=True):
        assert_bfloat16(*found, name=name)


def test_a_gpu_takes_alibi_of_bfloat16_heads_with_room_for_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def chosen(dtype=jnp.bfloat16, head_dim=16):
        q, k, v = (jnp.zeros((*a.shape[:3], head_dim), dtype) for a in arrays(256))
        with compiling_for("gpu"):
            return choose(None, inputs(q, k, v), None, cached=False)

    assert [chosen(), chosen(head_dim=120)] == ["cudnn"] * 2
    assert [chosen(jnp.float16), chosen(head_dim=128)] == ["blockwise"] * 2


def test_a_gpu_takes_gates_of_bfloat16_with_as_many_kv_heads_as_heads(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def chosen(q, k, v, log_gates):
        with compiling_for("gpu"):
            return choose(None, gated(q, k, v, log_gates), None, cached=False)

    q, k, v, log_gates = forgetting(256, least=-1.0)
    assert chosen(q, k, v, log_gates) == "cudnn"
    assert chosen(q, k[:, :, :2], v[:, :, :2], log_gates) == "blockwise"
    assert chosen(*(a.astype(jnp.float16) for a in (q, k, v)), log_gates) == "blockwise"


@pytest.fixture
def lowered(monkeypatch):
    """The program for a GPU that cuDNN supports, as text."""
    from jax._src.cudnn import fused_attention_stablehlo as shipped

    monkeypatch.setattr(shipped, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(shipped, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(shipped, "is_cuda_compute_capability_equal", lambda _: False)

    return lambda f, *args: jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_the_program_of_a_gpu_calls_cudnn_forward_and_backward(lowered):
    def loss(q, k, v):
        return accelerators.cudnn(inputs(q, k, v), scale=0.25, window=None).astype(jnp.float32).sum()

    assert lowered(jax.grad(loss, argnums=(0, 1, 2)), *arrays(256)).count("__cudnn$fmha") >= 2


def test_the_program_of_a_gpu_calls_cudnn_for_gates_without_gradients(lowered):
    def loss(q, k, v, log_gates):
        return accelerators.cudnn(gated(q, k, v, log_gates), scale=0.25, window=None).astype(jnp.float32).sum()

    arrays = forgetting(256, least=-1.0)
    assert "__cudnn$fmha" in lowered(loss, *arrays)
    assert "__cudnn$fmha" not in lowered(jax.grad(loss, argnums=3), *arrays)
