import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.ops.linear_attention.kernels import PowerKernel
from sympow_jax.ops.linear_attention.rows import by_rows
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
    tokens, states = jnp.arange(4.0 * 3 * 5).reshape(3, 4, 5), jnp.arange(4.0 * 2).reshape(4, 2)

    def function(tokens, state):
        return tokens + state.sum(1)[None, :, None], tokens.sum((0, 2))[:, None] - state

    def shapes(platform):
        with compiling_for(platform):
            split = functools.partial(by_rows, function, features=300_000, axis=1)  # of 3 rows the caches hold 2
            jax.tree.map(np.testing.assert_array_equal, split(tokens, states), function(tokens, states))
            return str(jax.make_jaxpr(split)(tokens, states))

    assert "f32[3,2,5]" in shapes("cpu")
    assert "f32[3,2,5]" not in shapes("tpu")


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
