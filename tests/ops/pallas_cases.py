"""What the tests of the fused kernels of TPUs and GPUs share: they are interpreted here, and compared."""

import contextlib
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import ops
from sympow_jax.ops.linear_attention.specs import ArgSpec
from sympow_jax.ops.platform import compiling_for, interpreting
from tests.ops.linear_attention_cases import evaluate
from tests.tolerances import assert_bfloat16, relative_error

OUTPUTS = ("out", "final state", "final normalizer")


@contextlib.contextmanager
def kernels_of(platform: str):
    """The kernels of tpu or gpu, interpreted."""
    with interpreting(), compiling_for(platform):
        yield


def check(platform: str, spec: ArgSpec, chunk_size: int = 16) -> None:
    """float32 errors are at most three times those of `chunked`, or below a few roundings."""
    expected = evaluate(spec, "reference", "float64")
    xla = evaluate(spec, "chunked", "float32", chunk_size=chunk_size)
    with kernels_of(platform):
        kernel = evaluate(spec, "pallas", "float32", chunk_size=chunk_size)
    scale = float(np.linalg.norm(expected["grad v"]))
    for name in expected:
        floor = 0.0 if name in OUTPUTS else scale
        error, allowed = (relative_error(x[name], expected[name], floor) for x in (kernel, xla))
        assert error <= max(3 * allowed, 1e-6), f"{name}: {error:.1e} against {allowed:.1e} of chunked"


def state_and_gradients(form, kernel, arrays, segment_ids, dtype):
    """`state_of` and its gradients."""
    weights = np.random.default_rng(3).normal(size=(2, 2, kernel.num_features(8), 6))

    def loss(floats):
        state = ops.state_of(kernel, **floats, segment_ids=jnp.asarray(segment_ids), implementation=form, chunk_size=8)
        extended = jnp.concatenate([state.state, state.normalizer[..., None]], axis=-1)
        return jnp.sum(extended * jnp.asarray(weights, dtype)), extended

    floats = {name: jnp.asarray(arrays[name], dtype) for name in ("k", "v", "log_gates")}
    (_, state), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    return {"state": state} | gradients


def check_state(platform: str, kernel) -> None:
    """What tokens leave behind, with its gradients; one row ends in padding, the other is one document."""
    arrays = ArgSpec(gates="strong", T=20, D=8, Dv=5, H=2, K=2, B=2).inputs()
    ids = np.repeat([[1, 2, 0]], [6, 12, 2], axis=1).astype(np.int32)
    ids = np.concatenate([ids, np.ones_like(ids)])
    with kernels_of(platform):
        actual = state_and_gradients("pallas", kernel, arrays, ids, "float32")
    with jax.enable_x64(True):
        expected = state_and_gradients("chunked", kernel, arrays, ids, "float64")
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 2e-6, name
    assert (np.asarray(actual["state"][0]) == 0).all() and np.asarray(actual["state"][1]).any()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, a, b):
    """A product whose operands, forward and backward, are bfloat16, as an accelerator's units take them."""
    low = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
    return jnp.einsum(equation, *low, precision="highest")


def _product_backward(equation, operands, cotangent):
    low = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (*operands, cotangent)]
    _, vjp = jax.vjp(functools.partial(jnp.einsum, equation, precision="highest"), *low[:2])
    return vjp(low[2])


_product.defvjp(lambda equation, a, b: (_product(equation, a, b), (a, b)), _product_backward)


def _dense(q, k, v, log_gates, *, einsum):
    """The formula itself for one head, [T, D]."""
    T = q.shape[0]
    total = jnp.cumsum(log_gates)
    decay = jnp.where(jnp.tri(T, dtype=bool), total[:, None] - total[None], -jnp.inf)
    weights = einsum("id,jd->ij", q, k) ** 2 * jnp.exp(decay)
    return einsum("ij,je->ie", weights, v) / jnp.sum(weights, axis=1, keepdims=True)


def check_bfloat16(
    platform: str, log_gate: float, mean: float, chunk_size: int = 16, form: Literal["pallas", "chunked"] = "pallas"
) -> None:
    """Gold is float64, the reference the dense formula with bfloat16 operands; values have this mean."""
    T, D = 320, 32
    rng = np.random.default_rng(0)
    q, k = ((1.0 + 0.3 * rng.normal(size=(T, D))) * rng.choice([-1.0, 1.0], size=(T, 1)) for _ in range(2))
    q, k, v, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, mean + rng.normal(size=(T, D)), q * k))
    gates = jnp.asarray(log_gate * rng.exponential(size=T), jnp.float32)

    def results(function, *inputs):
        out, vjp = jax.vjp(function, *inputs)
        return [np.asarray(x, np.float64) for x in (out, *vjp(cotangent.astype(out.dtype)))]

    def kernels(q, k, v, gates):
        options: dict = {"log_gates": gates[None, :, None], "implementation": form, "chunk_size": chunk_size}
        q, k, v = (x[None, :, None] for x in (q, k, v))
        return ops.power_attention(q, k, v, scale=1.0, **options)[0, :, 0]

    def rounded(q, k, v, gates):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        out = _dense(q, k, v, gates, einsum=_product)
        return out.astype(jnp.bfloat16)

    with kernels_of(platform):
        test = results(jax.jit(kernels), q, k, v, gates)
    reference = results(rounded, q, k, v, gates)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, gates)]
        gold = results(functools.partial(_dense, einsum=jnp.einsum), *wide)
    for name, *found in zip(("out", "dq", "dk", "dv", "dgates"), test, reference, gold, strict=True):
        assert_bfloat16(*found, name=name)
