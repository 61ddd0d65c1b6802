"""The fused TPU kernels, interpreted: values, states and gradients of `chunked`, races, and who may ask for them."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sympow_jax import ops
from sympow_jax.ops.linear_attention.kernels import PowerKernel, TaylorKernel
from sympow_jax.ops.linear_attention.pallas_tpu import layouts
from sympow_jax.ops.linear_attention.specs import ArgSpec
from sympow_jax.ops.platform import compiling_for, interpreting
from sympow_jax.ops.power_attention.arg_specs import TEST_SPECS as POWER_SPECS
from sympow_jax.ops.taylor_attention.arg_specs import TEST_SPECS as TAYLOR_SPECS
from tests.ops.linear_attention_cases import evaluate
from tests.ops.pallas_cases import check, check_bfloat16, check_state, state_and_gradients

# two blocks of the grid, documents, padding, a state before and after, two queries a key, head_dim padded
QUICK = ArgSpec(gates="strong", T=20, D=24, Dv=8, H=2, K=1, segments=True, initial_state=True)
LARGER = ArgSpec(gates="mild", T=250, D=32, Dv=16, H=2, K=1, segments=True, initial_state=True)
SUITE = [spec for spec in (*POWER_SPECS, *TAYLOR_SPECS) if spec.degree in (0, 2)] + [
    dataclasses.replace(LARGER, degree=degree, T=T, gates=gates)
    for degree, T, gates in ((2, 96, "none"), (0, 96, "strong"), (2, 250, "mild"))
]
MORE = (pytest.mark.slow, pytest.mark.quick)


def test_kernels_are_the_chunked_form():
    check("tpu", QUICK, 8)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SUITE, ids=str)
def test_all_cases_are_the_chunked_form(spec):
    check("tpu", spec)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [PowerKernel(2), TaylorKernel()], ids=str)
def test_the_state_left_behind(kernel):
    check_state("tpu", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["attention", "state"])
def test_no_races(run):
    with interpreting(pltpu.InterpretParams(detect_races=True)):
        if run == "attention":
            evaluate(QUICK, "pallas", "float32", chunk_size=8)
        else:
            arrays = ArgSpec(gates="mild", T=20, D=8, Dv=5, H=2, K=2, B=2).inputs()
            state_and_gradients("pallas", PowerKernel(2), arrays, np.ones((2, 20), np.int32), "float32")
    assert not races_found()
    pltpu.reset_tpu_interpret_mode_state()


def races_found() -> bool:
    """What the interpreter of the last kernel says, in either supported version of JAX."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = interpreter.get_races() if hasattr(interpreter, "get_races") else vars(interpreter)["races"]
    return races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(("log_gate", "mean"), [(0.0, 0.0), (-1e-3, 1.0), (-0.03, 1.0)])
def test_bfloat16_is_as_good_as_bfloat16_products(log_gate, mean):
    check_bfloat16("tpu", log_gate, mean)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("kernel", [PowerKernel(2), TaylorKernel()], ids=str)
@pytest.mark.parametrize("head_dim", [7, 16, 48])
def test_states_survive_the_order_of_features(kernel, head_dim):
    features = layouts.features_of(kernel, head_dim)
    state = jax.random.normal(jax.random.key(0), (3, kernel.num_features(head_dim), 6))
    values, moments = layouts.split_state(features, state, head_dim)
    assert values.shape == (3, 16, features.rows)
    assert moments.shape == (3, features.moments, features.moments)
    back = layouts.join_state(features, values, moments, head_dim, 5)
    np.testing.assert_allclose(back, state, rtol=1e-6)
    np.testing.assert_array_equal(moments, jnp.swapaxes(moments, 1, 2))


def test_what_cannot_be_done_is_said_in_one_line():
    q = jnp.zeros((1, 8, 1, 8))
    wide = jnp.zeros((1, 8, 1, 300))
    bias = ops.PositionBias({}, lambda params, i, j: jnp.zeros((1, len(i), len(j))))
    cases = [
        (q, {}, "needs a TPU or a GPU", False),
        (q, {"degree": 4}, "degree=4", True),
        (wide, {}, "head_dim=300", True),
        (q.astype(jnp.float16), {}, "float16", True),
        (q, {"bias": bias}, "cannot add a bias", True),
    ]
    for x, options, text, interpreted in cases:
        with interpreting(interpreted or None), pytest.raises(ValueError, match=text) as error:
            ops.power_attention(x, x, x, implementation="pallas", **options)
        assert ("\n" not in str(error.value) and "use 'chunked'" in str(error.value)) or "bias" in options


def lowered(devices: int, monkeypatch, **options) -> str:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.bfloat16)
    attend = jax.jit(functools.partial(ops.power_attention, **options))
    with compiling_for("tpu"):
        return attend.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()


def test_a_tpu_takes_the_kernel_where_it_surely_runs(monkeypatch):
    assert "tpu_custom_call" in lowered(1, monkeypatch)
    assert "tpu_custom_call" in lowered(8, monkeypatch, implementation="pallas")
    for options in ({"devices": 8}, {"devices": 1, "degree": 4}, {"devices": 1, "implementation": "chunked"}):
        assert "tpu_custom_call" not in lowered(**options, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_other_platforms_do_not_import_the_kernels():
    code = (
        "import sys, jax.numpy as jnp; from sympow_jax import ops; x = jnp.ones((1, 4, 1, 4)); "
        "ops.power_attention(x, x, x); ops.state_of(ops.PowerKernel(2), x, x); "
        "print([m for m in sys.modules if 'pallas' in m and m.startswith('sympow')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
