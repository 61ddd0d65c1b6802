"""What a plan knows of Pallas kernels, against arithmetic."""

import math

import jax
import jax.numpy as jnp
import pytest

from sympow_jax import ops
from sympow_jax.ops.platform import compiling_for
from sympow_jax.planning import hlo, kernels, work
from sympow_jax.planning.kernel_report import kernel_report
from sympow_jax.planning.schedules import Schedule
from sympow_jax.planning.targets import DEVICES, Target
from sympow_jax.planning.traffic import memory_bytes

T, D = 1024, 64


def traced(num_keys=2):
    """Jaxpr of the gradients of power attention of two query heads."""
    q, k = (jax.ShapeDtypeStruct((1, T, heads, D), jnp.bfloat16) for heads in (2, num_keys))

    def loss(q, k, v):
        return ops.power_attention(q, k, v, implementation="pallas").astype(jnp.float32).sum()

    with compiling_for("tpu"):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).jaxpr


def products(equation):
    """FLOPs of all products of a kernel's body, in all steps of its grid."""
    total = 0
    for inner in kernels._equations(equation.params["jaxpr"]):
        if inner.primitive.name == "dot_general":
            (contracted, _), _ = inner.params["dimension_numbers"]
            lhs = inner.invars[0].aval.shape
            total += 2 * math.prod(inner.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    return total * math.prod(equation.params["grid_mapping"].grid)


def test_estimates_of_the_kernels_are_their_products():
    calls = [e for e in kernels._equations(traced()) if e.primitive.name == "pallas_call"]
    assert len(calls) == 3
    for equation in calls:
        kernel = kernels._kernel(equation)
        arrays = sum(v.aval.size * v.aval.dtype.itemsize for v in (*equation.invars, *equation.outvars))
        assert kernel.bytes == arrays, kernel.name
        assert kernel.flops == pytest.approx(products(equation), rel=0.1), kernel.name
        assert kernel.even, kernel.name


def test_a_loop_over_queries_is_not_even():
    assert not any(kernel.even for kernel in kernels.traced_kernels(traced(num_keys=1)))


TEXT = """HloModule step
ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  ROOT %c = bf16[8,64]{1,0} custom-call(%x), custom_call_target="TARGET", metadata={op_name="jit(f)/mine/pallas_call"}, backend_config={"body":"abc"}
}"""  # noqa: E501


@pytest.mark.parametrize("target", kernels.TARGETS)
def test_a_call_counts_what_its_kernel_says(target):
    program = hlo.parse(TEXT.replace("TARGET", target))
    mine = kernels.Kernel("mine", ((8, 64),), 4, 1e6, 5000.0, True)
    other = kernels.Kernel("mine_too", ((8, 64),), 4, 1e7, 5000.0, True)
    assert work.flops(program, (other, mine)) == {"bfloat16": 1e6}
    assert memory_bytes(program, (other, mine)) == 5000
    (call,) = kernels.calls(program, (other, mine))
    assert (call.name, call.times, call.kernel) == ("mine", 1.0, mine)
    (unknown,) = kernels.calls(program, (other,))
    assert (unknown.name, unknown.kernel) == ("mine", None)


def test_static_time_counts_where_every_step_does_the_same():
    program = hlo.parse(TEXT.replace("TARGET", "tpu_custom_call"))
    v5e = Target("v5e:1x1", DEVICES["v5e"], (1, 1), ())
    for even in (True, False):
        mine = kernels.Kernel("mine", ((8, 64),), 4, 1e6, 5000.0, even)
        (call,) = kernels.calls(program, (mine,))
        row = kernel_report(call, v5e, lambda _: Schedule(1000, 0.5))
        cycle = 2 * 4 * 128**2 / 197e12
        assert row["bundles_per_step"] == 1000
        assert row["beyond_peak"] == pytest.approx(even * (4 * 1000 * cycle - 1e6 / 197e12))
        assert kernel_report(call, v5e, None)["beyond_peak"] == 0.0


def test_an_instruction_may_go_on_in_further_lines():
    """As splash attention's: what belongs to it after its metadata is its name, and what its compiler is given."""
    metadata = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n}}, metadata='
    program = hlo.parse(TEXT.replace("TARGET", "tpu_custom_call").replace("metadata=", metadata))
    mine = kernels.Kernel("mine", ((8, 64),), 4, 1e6, 5000.0, True)
    (call,) = kernels.calls(program, (mine,))
    assert (call.kernel, call.config) == (mine, '{"body":"abc"}')
