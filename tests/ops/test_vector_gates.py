"""Gates of every dim: what the one suite of all forms (test_linear_attention.py) leaves open."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.linear_attention.accelerators import obstacle, preferred
from sympow_jax.ops.linear_attention.dispatch import IMPLEMENTATIONS
from sympow_jax.ops.linear_attention.kernels import PowerKernel, TaylorKernel, state_decay
from sympow_jax.ops.linear_attention.vector_gates import pair_scores
from sympow_jax.ops.platform import compiling_for
from tests.tolerances import assert_bfloat16, assert_close

MORE = (pytest.mark.slow, pytest.mark.quick)


def arrays(T, D, *, H=2, K=1, fastest=6.9, seed=0):
    """q, k, v and log gates whose dims forget after a few tokens to ten thousand of them."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, n, D)) + 1, jnp.float32) for n in (H, K, K))
    return q, k, v, jnp.asarray(-np.geomspace(1e-4, fastest, D) * rng.uniform(0.5, 1.5, (1, T, K, D)), jnp.float32)


@pytest.mark.parametrize("form", ["chunked", *(pytest.param(n, marks=MORE) for n in IMPLEMENTATIONS if n != "chunked")])
def test_equal_gates_are_one_gate_a_head_to_the_power_of_the_degree(form):
    q, k, v, _ = arrays(10, 3)
    gate = jnp.asarray([-0.3, 0.0, -0.2, -np.inf, -0.1, 0.0, -1e30, -0.5, -0.4, 0.0], jnp.float32)[None, :, None]
    segment_ids = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)

    @functools.partial(jax.jit, static_argnames="dims")
    def run(q, k, v, gate, dims):
        def attend(q, k, v, gate):
            gates = jnp.broadcast_to(gate[..., None], (*gate.shape, dims)) if dims else 2 * gate
            options = {"segment_ids": segment_ids, "implementation": form, "chunk_size": 4}
            out, state = ops.power_attention_with_state(q, k, v, log_gates=gates, **options)
            return out, state.state, state.normalizer

        results, vjp = jax.vjp(attend, q, k, v, gate)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    vector, scalar = run(q, k, v, gate, 3), run(q, k, v, gate, 0)
    for found, want in zip(jax.tree.leaves(vector), jax.tree.leaves(scalar), strict=True):
        assert_close(found, want, "float32", "vector", scale=np.linalg.norm(scalar[1][2]))


def test_scores_of_a_chunk_are_the_products_of_its_gates():
    """By hand in float64, with gates that close and dims that keep everything side by side."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 3, 16)), rng.normal(size=(1, 3, 8))  # two queries a key
    gates = rng.uniform(size=(1, 3, 8)) * np.asarray([1e-3, 1.0, 1.0])[None, :, None]
    gates[0, 2, 5] = 0.0
    log_gates = np.log(np.maximum(gates, 1e-300))
    found = jax.jit(pair_scores)(*(x.astype(np.float32) for x in (q, k, np.maximum(log_gates, -1000))))
    for i in range(8):
        for j in range(8):
            decay = gates[0, :, j + 1 : i + 1].prod(axis=1) if i >= j else np.zeros(3)
            want = [np.sum(q[0, :, g * 8 + i] * k[0, :, j] * decay) for g in range(2)]
            np.testing.assert_allclose(found[0, j, [i, 8 + i]], want, rtol=1e-5, atol=1e-6)


@jax.jit
def decayed(gates, x):
    """The features of x times what gates leave of them, and those of the decayed x, for each kernel."""
    kernels = PowerKernel(2), PowerKernel(4), TaylorKernel()
    features = [(state_decay(kernel, gates) * kernel.features(x), kernel) for kernel in kernels]
    return [(left, kernel.features(gates[..., None] * x)) for left, kernel in features]


def test_a_state_decays_by_the_monomials_of_the_gates():
    rng = np.random.default_rng(0)
    gates, x = (rng.uniform(0.1, 1, size=(1, 2, 3)).astype(np.float32) for _ in range(2))
    for left, want in decayed(gates, x[..., None]):
        np.testing.assert_allclose(left, want, rtol=1e-5)
    assert state_decay(PowerKernel(4), jnp.asarray(gates[..., 0])).shape == (1, 2, 1, 1)


def test_states_and_steps_continue_the_dense_form():
    q, k, v, gates = arrays(9, 3)
    want = jax.jit(functools.partial(ops.taylor_attention, implementation="reference"))(q, k, v, log_gates=gates)
    state = jax.jit(functools.partial(ops.state_of, TaylorKernel(), chunk_size=2))(
        k[:, :5], v[:, :5], log_gates=gates[:, :5]
    )
    step = jax.jit(functools.partial(ops.taylor_step))  # with a cache of its own
    for t in range(5, 9):
        now = slice(t, t + 1)
        out, state = step(state, q=q[:, now], k=k[:, now], v=v[:, now], log_gates=gates[:, now])
        np.testing.assert_allclose(out[:, 0], want[:, t], rtol=2e-5, atol=2e-6)
    assert step._cache_size() == 1


def test_gates_of_planes_commute_with_the_rotation():
    """Where the text begins does not matter: six of eight dims are rotated, with one gate for each of three planes."""
    q, k, v, gates = arrays(7, 8)
    frequencies, _ = ops.positions.rope_frequencies(6)

    @jax.jit
    def attend(start, gates):
        phases = ops.positions.rope_phases(start + jnp.arange(7, dtype=jnp.int32)[None], frequencies)
        rotated = (ops.positions.rotate(x, phases) for x in (q, k))
        return ops.power_attention(*rotated, v, log_gates=gates, implementation="reference")

    def moved(gates):
        return np.abs(attend(jnp.int32(0), gates) - attend(jnp.int32(100), gates)).max()

    assert moved(ops.gates.plane_log_gates(gates[..., :5], 6)) < 1e-5
    assert moved(gates) > 1e-3


@pytest.mark.parametrize(("T", "sizes"), [(11, (1, 3)), pytest.param(300, (1, 48, 256), marks=pytest.mark.slow)])
def test_chunk_size_does_not_matter(T, sizes):
    q, k, v, gates = arrays(T, 3)
    run = jax.jit(functools.partial(ops.power_attention, implementation="chunked"), static_argnames="chunk_size")
    outs = [run(q, k, v, log_gates=gates, chunk_size=c) for c in sizes]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_bfloat16_at_2048_tokens():
    *inputs, gates = arrays(2048, 16)
    low = [x.astype(jnp.bfloat16) for x in inputs]
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=low[0].shape), jnp.bfloat16).astype(jnp.float32)

    def run(q, k, v, gates, cotangent):
        attend = functools.partial(ops.power_attention, implementation="chunked", chunk_size=128)
        out, vjp = jax.vjp(lambda q, k, v, g: attend(q, k, v, log_gates=g), q, k, v, gates)
        return out, *vjp(cotangent.astype(out.dtype))

    with jax.enable_x64(True):
        gold = [np.asarray(x) for x in jax.jit(run)(*(x.astype(jnp.float64) for x in (*low, gates, cotangent)))]
    names = ("out", "grad q", "grad k", "grad v", "grad log_gates")
    rounded = [x.astype(jnp.bfloat16).astype(np.float64) for x in gold]  # exact, rounded once
    for name, found, reference, want in zip(names, jax.jit(run)(*low, gates, cotangent), rounded, gold, strict=True):
        assert_bfloat16(np.asarray(found, np.float64), reference, want, name=name)


def test_the_fused_kernels_leave_them_to_others():
    call = {"head_dim": 64, "value_dim": 64, "dtype": jnp.dtype("float32")}
    with compiling_for("tpu"):
        assert preferred(PowerKernel(2), **call)
        assert not preferred(PowerKernel(2), **call, vector_gates=True)
        assert "gates of every dim" in str(obstacle(PowerKernel(2), **call, vector_gates=True))
    q, k, v, gates = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(4, 3))
    attend = functools.partial(ops.power_attention, implementation="pallas")
    with pytest.raises(ValueError, match="implementation='pallas'"):
        jax.eval_shape(lambda *x: attend(*x[:3], log_gates=x[3]), q, k, v, gates)
    with pytest.raises(ValueError, match=r"log_gates has shape .* must be \(1, 4, 1, 3\)"):
        jax.eval_shape(lambda *x: attend(*x[:3], log_gates=x[3][..., :2]), q, k, v, gates)


def test_the_condition_of_a_row_adds_up_what_the_gates_leave():
    q, k, _, gates = (np.asarray(x) for x in arrays(6, 3))
    equal = np.full_like(gates, -0.3)
    condition = jax.jit(functools.partial(ops.power_condition, degree=2))
    scores, sizes = q[0, :, 0] @ k[0, :, 0].T, np.abs(q[0, :, 0]) @ np.abs(k[0, :, 0]).T
    decay = np.tril(np.exp(-0.6 * (np.arange(6)[:, None] - np.arange(6)[None, :])))
    want = (sizes**2 * decay).sum(1) / (scores**2 * decay).sum(1)
    np.testing.assert_allclose(condition(q, k, log_gates=equal)[0, :, 0], want, rtol=1e-5)
    assert (condition(q, k, log_gates=gates) >= 1 - 1e-5).all()
