"""Remat policies: the same gradients from less and less memory, and attention run no more often than they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import print_saved_residuals

from sympow_jax.config import ConfigError
from sympow_jax.layers.linear import make_linear
from sympow_jax.models import remat
from sympow_jax.models.model import Model
from sympow_jax.ops.softmax_attention import accelerators
from tests.models.small import VOCAB, tiny_config
from tests.ops.test_accelerators import make_arrays, make_inputs

FORMS = {"conformal_sympow": "chunked", "softmax_rope": "blockwise"}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss_function(variant: str, policy: str):
    sizes = ("data.seq_len=256", "model.num_layers=4", "model.embed_dim=64", "model.num_heads=4", "model.mlp_dim=256")
    form = f"attention.implementation={FORMS[variant]}"
    model = Model(tiny_config(variant, *sizes, form, f"model.remat={policy}"), VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 256)).astype(np.int32)
    return lambda params: model.losses(params, tokens, tokens)[0].mean(), model.init(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("variant", FORMS)
def test_policies_give_the_same_gradients_from_less_memory(variant):
    """Bytes of temporaries of the compiled gradient: none > dots > attention > block."""
    compiled, results = {}, {}
    for policy in ("none", "dots", "attention", "block", "offload"):
        loss, params = loss_function(variant, policy)
        compiled[policy] = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        results[policy] = compiled[policy](params)
    for policy, (loss, grads) in results.items():
        np.testing.assert_allclose(loss, results["none"][0], rtol=1e-6, err_msg=policy)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results["none"][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=policy)
    memory = {policy: program.memory_analysis().temp_size_in_bytes for policy, program in compiled.items()}
    flops = {policy: program.cost_analysis()["flops"] for policy, program in compiled.items()}
    assert memory["none"] > memory["dots"] > memory["attention"] > memory["block"], memory
    assert flops["none"] < flops["dots"] < flops["attention"] < flops["block"], flops


@pytest.mark.slow
@pytest.mark.quick
def test_residuals_are_what_the_policy_names(capsys):
    """Attention outputs stay under `attention`, only the layers' inputs under `block`, host copies under `offload`."""
    saved = {}
    for policy in ("block", "attention", "offload"):
        loss, params = loss_function("conformal_sympow", policy)
        print_saved_residuals(loss, params)
        saved[policy] = [line for line in capsys.readouterr().out.splitlines() if "output of scan" in line]
    layers = len(saved["block"])  # what the scan over layers keeps
    assert layers == 1 and "f32[4,4,256,64]" in saved["block"][0]
    assert len(saved["attention"]) == layers + 3  # the output, the states of chunks, the final state
    assert len(saved["offload"]) == layers + 3 and all("<host>" in line for line in saved["offload"])


def test_offload_is_refused_where_there_is_no_host_memory_apart(monkeypatch):
    class Device:
        def addressable_memories(self):
            return [type("Memory", (), {"kind": "unpinned_host"})]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    remat.check_backend("attention")
    with pytest.raises(ConfigError, match="use 'attention' or 'block'"):
        remat.check_backend("offload")


def test_dots_keep_the_product_of_narrow_dtypes_with_a_bias(capsys):
    """It has a gradient of its own, inside which a policy sees no product."""
    linear = make_linear(tiny_config("softmax_nope", "model.dtype=bfloat16").model, 8, 16, bias=True, rngs=nnx.Rngs(0))
    layer = remat.rematerialise(lambda x: jnp.sin(linear(x)).sum(), "dots")
    print_saved_residuals(layer, jnp.ones((3, 8), jnp.bfloat16))
    assert "bf16[3,16] named 'projection'" in capsys.readouterr().out


def rematerialised(form, policy):
    """A layer of q, k, v."""
    return remat.rematerialise(lambda q, k, v: form(make_inputs(jnp.sin(q), k, v), scale=0.25, window=None), policy)


@pytest.mark.parametrize(("policy", "runs"), [("dots", 1), ("attention", 1), ("block", 2)])
def test_cudnn_runs_forward_once_where_attention_is_kept(policy, runs, monkeypatch):
    """As JAX traces it for a GPU with cuDNN 9.10, which this process need not have."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    layer = rematerialised(accelerators.cudnn, policy)
    traced = jax.make_jaxpr(jax.grad(lambda *arrays: layer(*arrays).sum()))(*make_arrays(jnp.bfloat16))
    assert str(traced).count(remat.CUDNN_FORWARD + "[") == runs


def test_splash_attention_keeps_its_output_and_normaliser(capsys):
    """By their name, which it gives them inside; else its forward kernel runs in the backward pass again."""
    print_saved_residuals(
        rematerialised(functools.partial(accelerators.splash, interpret=True), "dots"), *make_arrays()
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "_splash_attention" in line] == [
        "f32[1,4,256,16]",
        "f32[1,4,256]",
    ]
