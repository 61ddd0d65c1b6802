"""Gates of -inf, -1e30 and 0 in every entry of every kernel, against the products of the gates in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.linear_attention.dispatch import IMPLEMENTATIONS
from tests.tolerances import assert_close

T, H, K, D = 10, 2, 1, 2
WEIGHTS = {"softmax": jnp.exp, "power": jnp.square, "taylor": lambda s: 1 + s + s * s / 2}
KERNELS = {"power": ops.PowerKernel(2), "taylor": ops.TaylorKernel()}
CHUNK = {"chunk_size": 4}


@functools.cache
def arguments() -> tuple[np.ndarray, ...]:
    """q, k, v, log_gates, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(1, T, H, D), (1, T, K, D), (1, T, K, D), (1, T, H, D)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    log_gates = np.asarray([-0.3, 0.0, -0.2, -np.inf, -0.1, 0.0, -1e30, -0.5, -0.4, 0.0], np.float32)
    return q + 1, k + 1, v, log_gates[None, :, None], cotangent


def definition(kernel, q, k, v, log_gates):
    """sum_j w_ij v_j / sum_j w_ij, w_ij = kernel(q_i . k_j / sqrt(D)) times the gates of the tokens j + 1 .. i."""
    k, v, gates = (jnp.repeat(x, H // K, axis=2) for x in (k, v, jnp.exp(log_gates)))
    i, j, m = (jnp.arange(T).reshape(shape) for shape in ((T, 1, 1), (1, T, 1), (1, 1, T)))
    decay = jnp.where(((j < m) & (m <= i))[None, ..., None], gates[:, None, None], 1.0).prod(axis=3)
    scores = jnp.einsum("bihd,bjhd->bijh", q, k) / np.sqrt(D)
    weights = jnp.where((i >= j)[None], WEIGHTS[kernel](scores) * decay, 0.0)
    return jnp.einsum("bijh,bjhd->bihd", weights, v) / weights.sum(2)[..., None]


def out_and_gradients(attend, cotangent, *inputs):
    out, vjp = jax.vjp(attend, *inputs)
    return {"out": out} | dict(zip(("q", "k", "v", "log_gates"), vjp(cotangent), strict=True))


@functools.cache
def expected(kernel):
    with jax.enable_x64(True):
        *inputs, cotangent = (jnp.asarray(x, jnp.float64) for x in arguments())
        results = out_and_gradients(functools.partial(definition, kernel), cotangent, *inputs)
        return {name: np.asarray(x) for name, x in results.items()}


def softmax(form, q, k, v, log_gates):
    return ops.softmax_attention(q, k, v, log_gates=log_gates, implementation=form, block_size=4)


def softmax_at(form, q, k, v, log_gates):
    options = {"log_gates": log_gates, "implementation": form, "block_size": 4}
    return ops.softmax_attention_at(q, k, v, query_index=jnp.arange(T, dtype=jnp.int32), **options)


def softmax_of_slots(form, q, k, v, log_gates):
    slots = jnp.arange(T, dtype=jnp.int32)[None]
    options = {"positions": slots, "key_positions": slots, "implementation": form, "block_size": 4}
    return ops.softmax_attention(q, k, v, log_gates=log_gates, **options)


def linear_in_two(name, form, *inputs):
    """The state that the first half leaves is read by the second."""
    state, outs = None, []
    for half in (slice(0, 7), slice(7, T)):
        q, k, v, log_gates = (x[:, half] for x in inputs)
        options = {"log_gates": log_gates, "implementation": form, "initial_state": state} | CHUNK
        out, state = ops.linear_attention_with_state(KERNELS[name], q, k, v, **options)
        outs.append(out)
    return jnp.concatenate(outs, 1)


def linear_steps(name, q, k, v, log_gates):
    """The state of the first tokens by itself, then steps."""
    kernel, half = KERNELS[name], T // 2
    first = ops.linear_attention(kernel, *(x[:, :half] for x in (q, k, v)), log_gates=log_gates[:, :half])
    state = ops.state_of(kernel, k[:, :half], v[:, :half], log_gates=log_gates[:, :half], **CHUNK)

    def step(state, now):
        out, state = ops.linear_step(kernel, state, **now)
        return state, out[:, 0]

    tokens = {"q": q, "k": k, "v": v, "log_gates": log_gates}
    tokens = {name: jnp.swapaxes(x[:, half:, None], 0, 1) for name, x in tokens.items()}
    _, rest = jax.lax.scan(step, state, tokens)
    return jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], 1)


ENTRIES = {
    f"{entry.__name__}-{form}": ("softmax", functools.partial(entry, form))
    for entry in (softmax, softmax_at, softmax_of_slots)
    for form in ("reference", "blockwise")
}
ENTRIES |= {
    f"{entry.__name__}-{name}-{form}": (name, functools.partial(entry, name, form))
    for name, entry, forms in (("power", linear_in_two, IMPLEMENTATIONS), ("taylor", linear_in_two, ("chunked",)))
    for form in forms
}
ENTRIES |= {f"steps-{name}": (name, functools.partial(linear_steps, name)) for name in KERNELS}

SOON = ("softmax-blockwise", "softmax_at-reference", "linear_in_two-power-chunked", "steps-power")
MORE = (pytest.mark.slow, pytest.mark.quick)


@pytest.mark.parametrize("entry", [name if name in SOON else pytest.param(name, marks=MORE) for name in ENTRIES])
def test_closed_gates_are_products_with_zero(entry):
    kernel, attend = ENTRIES[entry]
    *inputs, cotangent = (jnp.asarray(x) for x in arguments())
    found = jax.jit(functools.partial(out_and_gradients, attend))(cotangent, *inputs)
    scale = np.linalg.norm(expected(kernel)["v"])
    for name, want in expected(kernel).items():
        assert_close(found[name], want, "float32", "extreme", name=name, scale=0.0 if name == "out" else scale)


def test_closed_gates_in_a_cache():
    q, k, v, log_gates, _ = (jnp.asarray(x) for x in arguments())
    cache = ops.cache.empty_cache(1, K, T + 3, D, D, gate_heads=K, dtype="float32")

    @jax.jit
    def read(cache, offset, q, k, v, log_gates):
        positions = offset + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        cache = ops.cache.append(cache, k, v, log_gates=log_gates, positions=positions, offset=offset)
        return ops.cache.cached_attention(q, cache, positions=positions, offset=offset, scale=D**-0.5), cache

    outs = []
    for part in (slice(0, 5), slice(5, T)):
        out, cache = read(cache, jnp.int32(part.start), *(x[:, part] for x in (q, k, v, log_gates)))
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), expected("softmax")["out"], "float32", "extreme")


def test_closed_gates_in_a_condition_number():
    q, k, _, log_gates, _ = (jnp.asarray(x) for x in arguments())
    condition = jax.jit(ops.power_condition)(q, k, log_gates=log_gates)
    np.testing.assert_allclose(condition[:, 3], 1.0 / jnp.square(cosine(q, k)[:, 3]), rtol=1e-4)  # one key is left


def cosine(q, k):
    k = jnp.repeat(k, H // K, axis=2)
    return jnp.sum(q * k, -1) / (jnp.linalg.norm(q, axis=-1) * jnp.linalg.norm(k, axis=-1))
