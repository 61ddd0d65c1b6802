"""The fused GPU kernels, interpreted: values, states and gradients of `chunked`, and who may ask for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.linear_attention.kernels import PowerKernel
from sympow_jax.ops.linear_attention.pallas_gpu import layouts
from sympow_jax.ops.linear_attention.specs import ArgSpec
from sympow_jax.ops.platform import compiling_for, interpreting
from sympow_jax.ops.power_attention.arg_specs import TEST_SPECS
from tests.ops.pallas_cases import check, check_bfloat16, check_state, kernels_of
from tests.tolerances import relative_error

# two chunks of two tiles, documents, padding, a state before and after, two queries a key, two parts, one padded
QUICK = ArgSpec(gates="strong", T=40, D=12, Dv=5, H=2, K=1, segments=True, initial_state=True)
LARGER = ArgSpec(gates="mild", T=250, D=32, Dv=16, H=2, K=1, segments=True, initial_state=True)
SUITE = [spec for spec in TEST_SPECS if spec.degree == 2] + [
    dataclasses.replace(LARGER, T=T, gates=gates, B=B) for T, gates, B in ((96, "none", 2), (250, "mild", 1))
]


def test_kernels_are_the_chunked_form():
    check("gpu", QUICK, 32)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SUITE, ids=str)
def test_all_cases_are_the_chunked_form(spec):
    check("gpu", spec, 32)


@pytest.mark.slow
def test_the_state_left_behind():
    check_state("gpu", PowerKernel(2))


@pytest.mark.slow
@pytest.mark.parametrize(("log_gate", "mean"), [(0.0, 0.0), (-1e-3, 1.0), (-0.03, 1.0)])
def test_bfloat16_is_as_good_as_bfloat16_products(log_gate, mean):
    check_bfloat16("gpu", log_gate, mean, 32)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [7, 16, 48])
def test_states_survive_the_order_of_features(head_dim):
    state = jax.random.normal(jax.random.key(0), (2, 3, PowerKernel(2).num_features(head_dim), 6))
    values, normaliser = layouts.split_state(state, head_dim)
    D = normaliser.shape[-1]
    assert values.shape == (2, 3, D // 2 + 1, D, 16) and D in (16, 64)
    np.testing.assert_allclose(layouts.join_state((values, normaliser), head_dim, 5), state, rtol=1e-6)


def test_what_cannot_be_done_is_said_in_one_line():
    q, wide = jnp.zeros((1, 8, 1, 8)), jnp.zeros((1, 8, 1, 160))
    cases = [
        (q, ops.PowerKernel(4), "degree=4"),
        (wide, ops.PowerKernel(2), "head_dim=160.*at most 128"),
        (q.astype(jnp.float16), ops.PowerKernel(2), "float16"),
        (q, ops.TaylorKernel(), "Taylor"),
    ]
    for x, kernel, text in cases:
        with compiling_for("gpu"), pytest.raises(ValueError, match=text) as error:
            ops.linear_attention(kernel, x, x, x, implementation="pallas")
        assert "\n" not in str(error.value) and "use 'chunked'" in str(error.value)


def test_a_gpu_takes_the_kernels_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.bfloat16)

    def traced(**options):
        with compiling_for("gpu"), interpreting():
            return str(jax.make_jaxpr(functools.partial(ops.power_attention, **options))(x, x, x))

    assert "linear_attention_forward" in traced(implementation="pallas")
    assert "pallas_call" not in traced()


def test_what_the_last_keys_leave_keeps_its_digits_behind_a_long_past():
    """All tokens of a shard are one chunk of the kernel; of 4,096 only the last few leave anything."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, 4096, 1, 4)), jnp.float32) for _ in range(2))
    gates = jnp.asarray(-0.45 + 0.01 * rng.random((1, 4096, 1)), jnp.float32)
    last = {"log_gates": gates[:, -256:], "implementation": "recurrent"}
    want = ops.state_of(PowerKernel(2), k[:, -256:], v[:, -256:], **last)
    with kernels_of("gpu"):
        state = ops.state_of(PowerKernel(2), k, v, log_gates=gates, implementation="pallas")
    assert relative_error(np.asarray(state.state), np.asarray(want.state)) < 2e-6
