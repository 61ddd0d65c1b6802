import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.ops.linear_attention.chunked import _by_rows
from sympow_jax.ops.linear_attention.kernels import PowerKernel
from sympow_jax.ops.platform import compiling_for, target_platform


def test_the_platform_is_the_process_s_own_unless_named():
    assert target_platform() == jax.default_backend()
    with compiling_for("tpu"):
        assert target_platform() == "tpu"
    with pytest.raises(ValueError, match=r"platform='cuda': choose cpu, gpu or tpu"):
        compiling_for("cuda")


def test_naming_a_platform_traces_again():
    seen = []

    @jax.jit
    def traced(x):
        seen.append(target_platform())
        return x

    for platform in ("cpu", "tpu", "cpu"):
        with compiling_for(platform):
            traced(jnp.float32(1))
    assert seen == ["cpu", "tpu"]


def test_rows_are_split_for_cpu_caches_only_on_the_cpu():
    R, D, C = 2, 128, 128  # 8,256 features of 128 tokens: one row fills the caches
    tokens = (jnp.zeros((1, 1, R, D, C)), jnp.zeros((1, 1, R, D, C)), jnp.zeros((1, 1, R, 2, C)))
    arguments = (tokens, jnp.zeros((1, 1, R, C)), jnp.zeros((1, 1, R, C), jnp.int32))

    def shapes(platform):
        with compiling_for(platform):
            jaxpr = jax.make_jaxpr(lambda a, s: _by_rows(PowerKernel(2), a, s))(arguments, jnp.zeros((R, 2, 8256)))
        return str(jaxpr)

    assert "f32[1,2,8256]" in shapes("cpu")
    assert "f32[1,2,8256]" not in shapes("tpu")


@pytest.mark.parametrize("D", [1, 2, 5, 8])
def test_the_expansion_of_each_platform_is_the_same(D):
    x = jax.random.normal(jax.random.key(0), (3, D, 7))

    def expansion(platform):
        with compiling_for(platform):
            return PowerKernel(2).features(x), str(jax.make_jaxpr(PowerKernel(2).features)(x))

    (on_cpu, by_copies), (on_tpu, by_slices) = expansion("cpu"), expansion("tpu")
    assert by_copies != by_slices
    np.testing.assert_allclose(on_tpu, on_cpu, rtol=1e-6)
    assert on_tpu.shape == (3, D * (D + 1) // 2, 7)
