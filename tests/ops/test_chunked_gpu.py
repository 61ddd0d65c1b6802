"""The chunked form as GPUs get it: features in bfloat16 where the inputs are, every state kept, no branches."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sympow_jax import ops
from sympow_jax.ops.linear_attention import chunked
from sympow_jax.ops.linear_attention.specs import ArgSpec
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.residuals import ATTENTION
from tests.ops.linear_attention_cases import evaluate
from tests.ops.pallas_cases import check_bfloat16
from tests.tolerances import assert_close


def gradients(dtype, platform: str, T: int = 320) -> str:
    x = jax.ShapeDtypeStruct((1, T, 2, 8), dtype)

    def loss(q, k, v):
        return ops.power_attention(q, k, v, implementation="chunked", chunk_size=16).astype(jnp.float32).sum()

    with compiling_for(platform):
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x))


def test_features_are_stored_in_the_dtype_of_the_inputs():
    features = "bf16[2,36,16]"
    assert features in gradients(jnp.bfloat16, "gpu")
    assert features not in gradients(jnp.float32, "gpu") and features not in gradients(jnp.bfloat16, "cpu")
    assert "cond[" not in gradients(jnp.bfloat16, "gpu") and "cond[" in gradients(jnp.bfloat16, "cpu")


def test_states_are_kept_while_they_are_small(monkeypatch):
    assert chunked._plan(320, 16, 100)[1] > 1
    with compiling_for("gpu"):
        assert chunked._plan(320, 16, 100) == (20, 1)
        monkeypatch.setattr(chunked, "KEPT_ON_GPU", 1999)
        assert chunked._plan(320, 16, 100)[1] > 1


def test_states_are_made_again_where_a_policy_keeps_attention():
    x = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)
    form = functools.partial(ops.power_attention, implementation="chunked", chunk_size=16)
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)

    def saved(platform: str) -> set[tuple[int, ...]]:
        with compiling_for(platform):
            backward = jax.eval_shape(lambda *x: jax.vjp(jax.checkpoint(form, policy=policy), *x)[1], x, x, x)
        return {leaf.shape for leaf in jax.tree.leaves(backward)}

    outputs, states = (16, 1, 2, 9, 16), (16, 2, 9, 36)
    assert {outputs, states} <= saved("cpu")
    assert outputs in saved("gpu") and states not in saved("gpu")


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["none", "extreme"])
def test_values_and_gradients_are_those_of_the_reference(gates):
    spec = ArgSpec(gates=gates, T=300, D=7, Dv=5, H=4, K=2, segments=True, initial_state=True)
    with compiling_for("gpu"):
        actual = evaluate(spec, "chunked", "float32")
    expected = evaluate(spec, "reference", "float64")
    for name, array in expected.items():
        assert_close(actual[name], array, "float32", gates, name=name, scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("log_gate", "mean"), [(0.0, 0.0), (-1e-3, 1.0), (-0.03, 1.0)])
def test_bfloat16_features_are_as_good_as_bfloat16_products(log_gate, mean):
    check_bfloat16("gpu", log_gate, mean, 16, "chunked")
