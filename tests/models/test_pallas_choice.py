"""Which config gets the kernel of a TPU, and what other platforms make of it."""

import jax
import jax.numpy as jnp
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model, on_this_platform, resolve_implementation
from sympow_jax.ops.platform import compiling_for
from tests.models.small import VOCAB, tiny_config

LONG = "data.seq_len=8192"


def chosen(platform: str, variant: str, *flags: str) -> str:
    with compiling_for(platform):
        return resolve_implementation(tiny_config(variant, *flags)).attention.implementation


def test_auto_is_the_kernel_on_a_tpu_where_it_can_do_the_job():
    assert [chosen(platform, "conformal_sympow", LONG) for platform in ("tpu", "gpu", "cpu")] == [
        "pallas",
        "chunked",
        "chunked",
    ]
    assert chosen("tpu", "based", LONG) == chosen("tpu", "rebased", LONG) == "pallas"
    assert chosen("tpu", "sympow", LONG, "attention.degree=4") in ("chunked", "blockwise")
    assert [chosen(p, "softmax_rope", LONG) for p in ("tpu", "gpu", "cpu")] == ["auto", "auto", "blockwise"]
    assert chosen("tpu", "sympow", LONG, "attention.implementation=chunked") == "chunked"


@pytest.mark.parametrize(("flags", "fused"), [((), True), (("attention.implementation=blockwise",), False)])
def test_a_softmax_model_has_the_kernel_of_a_tpu(flags, fused, monkeypatch):
    """In its layers, not in the op alone: a form that was resolved by name would never be the kernel."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with compiling_for("tpu"):
        model = Model(resolve_implementation(tiny_config("softmax_rope", "data.seq_len=256", *flags)), VOCAB)
        params = jax.eval_shape(model.init, jax.random.key(0))
        program = str(jax.make_jaxpr(model.logits)(params, jax.ShapeDtypeStruct((1, 256), jnp.int32)))
    assert ("pallas_call" in program) == fused


def test_a_model_trained_with_the_kernel_is_read_elsewhere_by_the_same_sums():
    with compiling_for("tpu"):
        config = resolve_implementation(tiny_config("sympow", LONG))
        assert on_this_platform(config) == config
    assert config.attention.implementation == "pallas" and config.attention.is_linear_form
    assert on_this_platform(config).attention.implementation == "chunked"


def test_the_kernel_has_one_degree():
    with pytest.raises(ConfigError, match=r"'pallas': it has attention.degree = 2, not 4; use 'chunked' or 'auto'"):
        tiny_config("sympow", "attention.degree=4", "attention.implementation=pallas")
