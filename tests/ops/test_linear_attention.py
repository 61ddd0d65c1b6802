"""Every form of power and Taylor attention against the dense reference in float64: values, states, gradients."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.linear_attention.dispatch import IMPLEMENTATIONS, cheapest
from sympow_jax.ops.linear_attention.inputs import normalise
from sympow_jax.ops.linear_attention.kernels import PowerKernel, TaylorKernel
from sympow_jax.ops.linear_attention.specs import VECTOR_SPECS, ArgSpec
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.power_attention.arg_specs import TEST_SPECS as POWER_SPECS
from sympow_jax.ops.taylor_attention.arg_specs import TEST_SPECS as TAYLOR_SPECS
from tests.ops.linear_attention_cases import evaluate
from tests.tolerances import assert_bfloat16, assert_close

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
SPECS = [*POWER_SPECS, *TAYLOR_SPECS]
QUICK = [spec for spec in SPECS if spec.T == 37] + [spec for spec in VECTOR_SPECS if spec.T < 1000]
MORE = (pytest.mark.slow, pytest.mark.quick)


def soon(spec: ArgSpec, implementation: str) -> bool:
    """Power of degree 2 in blocks, and it, degree 4 and Taylor's kernel in chunks; the rest is in the slow suite."""
    only_chunks = spec.degree != 2 or spec.gates == "vector"
    forms = ("blockwise", "chunked")[only_chunks:]
    return spec in QUICK and spec.T == 37 and implementation in forms and spec.degree < 6


@functools.cache
def oracle(spec: ArgSpec) -> dict[str, np.ndarray]:
    return evaluate(spec, "reference", "float64")


def test_specs_hold_every_pair_of_choices():
    required = {
        "kernel": {0, 2, 4, 6},  # 0 is Taylor
        "gates": {"none", "mild", "strong", "extreme"},
        "T": {1, 37, 63, 64, 1000},
        **{name: {False, True} for name in ("odd head_dim", "grouped queries", "segments", "initial state")},
    }
    chosen = [(s.degree, s.gates, s.T, s.D % 2 == 1, s.H != s.K, s.segments, s.initial_state) for s in SPECS]
    for (a, first), (b, second) in itertools.combinations(enumerate(required.values()), 2):
        assert {(spec[a], spec[b]) for spec in chosen} == set(itertools.product(first, second))


@pytest.mark.parametrize(
    ("spec", "implementation"),
    [
        pytest.param(s, form, id=f"{s}-{form}", marks=() if soon(s, form) else MORE if s in QUICK else pytest.mark.slow)
        for s, form in itertools.product((*SPECS, *VECTOR_SPECS), IMPLEMENTATIONS)
    ],
)
def test_agrees_with_the_oracle(spec, implementation):
    actual, expected = evaluate(spec, implementation, "float32"), oracle(spec)
    assert actual.keys() == expected.keys()
    scale = np.linalg.norm(expected["grad v"])
    for name in expected:
        floor = 0.0 if name in ("out", "final state", "final normalizer") else scale
        assert_close(actual[name], expected[name], "float32", spec.gates, name=name, scale=floor)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def run_golden(arrays, implementation, attention):
    names = [n for n in ("q", "k", "v", "log_gates") if n in arrays]

    def run(*inputs):
        q, k, v, *gates = inputs
        return attention(q, k, v, log_gates=gates[0] if gates else None, implementation=implementation, chunk_size=16)

    def both(cotangent, *inputs):
        out, vjp = jax.vjp(run, *inputs)
        return out, vjp(cotangent)

    out, gradients = jax.jit(both)(arrays["cotangent"], *(arrays[n] for n in names))
    assert_close(out, arrays["out"], "golden", "outputs", name="out")
    scale = np.linalg.norm(arrays["grad_v"])
    for name, gradient in zip(names, gradients, strict=True):
        kind = "outputs" if name in ("v", "log_gates") else "gradients"
        assert_close(gradient, arrays[f"grad_{name}"], "golden", kind, name=f"grad {name}", scale=scale)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("power_p2_mild_B2H4K2D16T37", "chunked"),
        ("power_p2_mild_B2H4K2D16T37", "blockwise"),
        ("based_B2H4D16T37", "blockwise"),
    ],
)
def test_reference_vectors(name, implementation):
    check_golden(name, implementation)


@pytest.mark.quick
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunked", "blockwise"])
@pytest.mark.parametrize(
    "name", sorted(p.stem for p in GOLDEN.glob("*.npz") if p.stem.split("_")[0] in ("power", "based", "rebased"))
)
def test_all_reference_vectors(name, implementation):
    check_golden(name, implementation)


def check_golden(name: str, implementation: str) -> None:
    arrays = golden(f"{name}.npz")
    if name.startswith("power"):
        attention = functools.partial(ops.power_attention, degree=int(arrays["degree"]))
    else:
        attention = ops.taylor_attention if name.startswith("based") else ops.power_attention
    run_golden(arrays, implementation, attention)


def random_inputs(B, T, H, K, D, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, n, D)) for n in (H, K, K))
    return [jnp.asarray(x, dtype) for x in (q + 1, k + 1, v)], jnp.asarray(-0.1 * rng.random((B, T, K)), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality_by_gradients(implementation):
    (q, k, v), gates = random_inputs(1, 12, 2, 2, 4)

    def early(q, k, v, gates):
        return ops.power_attention(q, k, v, log_gates=gates, implementation=implementation, chunk_size=4)[:, :7].sum()

    for gradient in jax.jit(jax.grad(early, argnums=(0, 1, 2, 3)))(q, k, v, gates):
        np.testing.assert_array_equal(gradient[:, 7:], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_rows_and_dead_gates_are_zero_and_finite(implementation):
    (q, k, v), gates = random_inputs(1, 12, 2, 2, 4)
    k = k.at[:, :3].set(0.0)  # the first three rows have no weight at all
    q = q.at[:, 6].set(0.0)
    gates = gates.at[:, 5].set(-jnp.inf)

    def loss(q, k, v, gates):
        out = ops.power_attention(q, k, v, log_gates=gates, implementation=implementation, chunk_size=4)
        return (out * out).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, out), gradients = run(q, k, v, gates)
    np.testing.assert_array_equal(out[:, [0, 1, 2, 6]], 0)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[0][:, [0, 1, 2, 6]], 0)
    np.testing.assert_allclose(out[:, 5], jnp.broadcast_to(v[:, 5], out[:, 5].shape), rtol=1e-5)


@pytest.mark.parametrize(
    "implementation", ["chunked", *(pytest.param(n, marks=MORE) for n in ("reference", "blockwise"))]
)
def test_documents_equal_running_each_alone(implementation):
    (q, k, v), gates = random_inputs(1, 30, 2, 2, 4)
    ids = jnp.asarray(np.repeat([[3, 5, 0, 3]], [11, 8, 2, 9], axis=1), jnp.int32)
    run = jax.jit(functools.partial(ops.power_attention_with_state, implementation=implementation, chunk_size=8))
    out, final = run(q, k, v, log_gates=gates, segment_ids=ids)
    for start, stop in ((0, 11), (11, 19), (21, 30)):
        part = slice(start, stop)
        alone, state = run(q[:, part], k[:, part], v[:, part], log_gates=gates[:, part])
        np.testing.assert_allclose(out[:, part], alone, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(out[:, 19:21], 0)
    np.testing.assert_allclose(final.state, state.state, rtol=2e-5, atol=2e-5)
    assert int(final.segment_id[0]) == 3


def test_only_the_same_document_continues_a_state():
    (q, k, v), _ = random_inputs(1, 8, 2, 2, 4)
    run = jax.jit(functools.partial(ops.power_attention_with_state, implementation="chunked", chunk_size=4))
    past = [x[:, ::-1] for x in (q, k, v)]
    _, state = run(*past, segment_ids=jnp.full((1, 8), 4, jnp.int32))
    outs = {}
    for name, start in (("same", 4), ("other", 5)):
        ids = jnp.full((1, 8), start, jnp.int32)
        outs[name], _ = run(q, k, v, segment_ids=ids, initial_state=state)
    whole = [jnp.concatenate([a, b], axis=1) for a, b in zip(past, (q, k, v), strict=True)]
    np.testing.assert_allclose(outs["same"], run(*whole)[0][:, 8:], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(outs["other"], run(q, k, v)[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", ["power", "taylor"])
def test_prefill_and_steps_equal_the_parallel_form(kernel):
    (q, k, v), gates = random_inputs(2, 21, 4, 2, 4)
    with_state = jax.jit(
        getattr(ops, f"{kernel}_attention_with_state"), static_argnames=("implementation", "chunk_size")
    )
    step = jax.jit(getattr(ops, f"{kernel}_step"))
    whole, final = with_state(q, k, v, log_gates=gates, implementation="chunked", chunk_size=8)
    out, state = with_state(q[:, :13], k[:, :13], v[:, :13], log_gates=gates[:, :13], implementation="recurrent")
    outs = [out]
    for t in range(13, 21):
        now = slice(t, t + 1)
        out, state = step(state, q=q[:, now], k=k[:, now], v=v[:, now], log_gates=gates[:, now])
        outs.append(out)
    assert step._cache_size() == 1
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=3e-5, atol=3e-6)
    np.testing.assert_allclose(state.state, final.state, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("degree", "scale"), [(4, 1e-6), (6, 3e4)])
def test_the_size_of_the_weights_does_not_matter(implementation, degree, scale):
    """The normaliser cancels the scale, in gradients too: 1 / den^2 is inf for the one and 0 for the other."""
    (q, k, v), gates = random_inputs(1, 8, 2, 1, 4)

    def loss(q, k, v, gates, scale):
        options = {"degree": degree, "log_gates": gates, "implementation": implementation, "chunk_size": 4}
        return jnp.sum(ops.power_attention(q, k, v, scale=scale, **options) ** 2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
    for actual, expected in zip(gradients(q, k, v, gates, scale), gradients(q, k, v, gates, 1.0), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("T", [5, 100])
def test_chunk_size_does_not_matter(T):
    (q, k, v), gates = random_inputs(1, T, 2, 1, 4)
    run = jax.jit(functools.partial(ops.power_attention, implementation="chunked"), static_argnames="chunk_size")
    outs = [run(q, k, v, log_gates=gates, chunk_size=c) for c in (1, 3, 64)]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=2e-5, atol=2e-6)


def test_checkpointed_states_give_the_same_gradients():
    """Forty chunks: several segments, one of them padded."""
    spec = ArgSpec(T=37, segments=True, initial_state=True)
    actual, expected = evaluate(spec, "chunked", "float32", chunk_size=1), oracle(spec)
    scale = np.linalg.norm(expected["grad v"])
    for name in expected:
        assert_close(actual[name], expected[name], "float32", "mild", name=name, scale=scale)


@pytest.mark.slow
def test_bfloat16_at_65536_tokens():
    (q, k, v), gates = random_inputs(1, 65536, 1, 1, 16)
    gates = gates * 0.01
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=q.shape), jnp.bfloat16).astype(jnp.float32)

    def run(q, k, v, gates, cotangent, chunk_size=128):
        attention = functools.partial(ops.power_attention, implementation="chunked", chunk_size=chunk_size)
        out, vjp = jax.vjp(lambda q, k, v, g: attention(q, k, v, log_gates=g), q, k, v, gates)
        return out, *vjp(cotangent.astype(out.dtype))

    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (*low, gates, cotangent)]
        gold = [np.asarray(x) for x in jax.jit(run)(*wide)]
    test = jax.jit(run)(*low, gates, cotangent)
    # the strictest reference there is: the exact result, rounded once to bfloat16
    names = ("out", "grad q", "grad k", "grad v", "grad log_gates")
    rounded = [x.astype(jnp.bfloat16).astype(np.float64) for x in gold]
    for name, actual, reference, expected in zip(names, test, rounded, gold, strict=True):
        assert_bfloat16(np.asarray(actual, np.float64), reference, expected, name=name)


def test_errors_are_one_line_that_names_the_argument():
    (q, k, v), _ = random_inputs(1, 4, 4, 2, 4)
    cases = [
        (dict(degree=3), "degree=3"),
        (dict(implementation="chunky"), "implementation='chunky'"),
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(bias=linear_bias(), implementation="chunked"), "'reference' or 'blockwise'"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text) as error:
            ops.power_attention(q, k, v, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^bias needs the positions of past keys, which a state does not keep"):
        ops.power_attention_with_state(q, k, v, bias=linear_bias())


def slopes_times_distance(params, i, j):
    return -params["slopes"][:, None, None] * jnp.abs(i[:, None] - j[None, :]).astype(jnp.float32)[None]


def linear_bias():
    return ops.PositionBias({"slopes": jnp.asarray([0.1, 0.2, 0.3, 0.4])}, slopes_times_distance)


def test_bias_equals_a_fixed_gate_and_has_gradients():
    (q, k, v), _ = random_inputs(1, 20, 4, 4, 4)
    bias = linear_bias()
    gates = jnp.broadcast_to(-bias.params["slopes"], (1, 20, 4))

    def loss(bias, implementation):
        out = ops.power_attention(q, k, v, bias=bias, implementation=implementation, chunk_size=8)
        return (out * v).sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, dense), expected = run(bias, "reference")
    (_, blocks), actual = run(bias, "blockwise")
    gated = jax.jit(ops.power_attention)(q, k, v, log_gates=gates)
    np.testing.assert_allclose(dense, gated, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(blocks, dense, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(actual.params["slopes"], expected.params["slopes"], rtol=1e-4, atol=1e-5)


def test_query_gradients_are_orthogonal_to_queries():
    """The output does not depend on the length of a query: q_i . dq_i = 0 (a check, not a term of the gradient)."""
    (q, k, v), gates = random_inputs(1, 37, 2, 2, 4)
    run = functools.partial(ops.power_attention, k=k, v=v, log_gates=gates, implementation="chunked", chunk_size=8)
    gradient = jax.jit(jax.grad(lambda q: (run(q) * v).sum()))(q)
    assert np.abs((gradient * q).sum(-1)).max() < 1e-5 * np.abs(gradient).max() * np.abs(q).max()


def test_condition_tells_which_rows_lose_digits():
    (q, k, v), _ = random_inputs(1, 24, 2, 2, 8)
    query = q[0, -1, 0]
    k = k - 0.98 * (k @ query)[..., None] * query[None, None, None] / jnp.sum(
        query**2
    )  # nearly orthogonal to one query
    condition = jax.jit(functools.partial(ops.power_condition, degree=4))(q, k)
    assert condition.shape == (1, 24, 2)
    assert (condition >= 1 - 1e-5).all()
    assert condition[0, -1, 0] > 1e4 * jnp.median(condition)
    run = jax.jit(functools.partial(ops.power_attention, degree=4, chunk_size=8), static_argnames="implementation")
    error = jnp.abs(run(q, k, v, implementation="recurrent") - run(q, k, v, implementation="reference")).max(-1)
    assert error[0, -1, 0] > 10 * jnp.median(error)
    well = condition < 1e3
    assert (jnp.where(well, error, 0.0) < 1e-6 * condition).all()


def test_gates_of_zeros_are_hidden_from_the_compiler():
    """XLA sums constants at compile time, element by element: minutes for the cumulative gates of a long context."""
    q = jax.ShapeDtypeStruct((1, 256, 1, 8), jnp.float32)
    attend = functools.partial(ops.power_attention, implementation="chunked", chunk_size=64)
    assert "optimization_barrier" in jax.jit(attend).lower(q, q, q).as_text()


@pytest.mark.parametrize(("degree", "crossing"), [(2, 528 + 512), (4, 4 * 3876), (0, 1 + 16 + 136 + 512)])
def test_the_cheapest_form_changes_at_the_measured_length(degree, crossing):
    kernel, head_dim = {2: (PowerKernel(2), 32), 4: (PowerKernel(4), 16), 0: (TaylorKernel(), 16)}[degree]
    features = kernel.num_features(head_dim)
    chosen = {T: cheapest(kernel, T, features, has_bias=False) for T in (1, 2, crossing, crossing + 1)}
    assert list(chosen.values()) == ["recurrent", "blockwise", "blockwise", "chunked"]
    assert cheapest(kernel, crossing + 1, features, has_bias=True) == "blockwise"


def test_an_empty_state_is_not_read_and_has_the_gradient_of_any_other():
    (q, k, v), gates = random_inputs(1, 6, 2, 2, 3)
    empty = ops.empty_state(PowerKernel(2), 1, 2, 3, 3)

    def output(state, implementation):
        options = {"log_gates": gates, "initial_state": state, "implementation": implementation}
        return ops.power_attention_with_state(q, k, v, **options)[0]

    def gradient(implementation):
        return jax.jit(jax.grad(lambda state: output(state, implementation).sum(), allow_int=True))(empty)

    assert "cond" in str(jax.make_jaxpr(lambda state: output(state, "blockwise"))(empty))
    expected, found = gradient("reference"), gradient("blockwise")
    assert np.abs(expected.state).max() > 0.1
    np.testing.assert_allclose(found.state, expected.state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.normalizer, expected.normalizer, rtol=1e-5, atol=1e-6)


def test_the_state_is_the_decayed_sum_over_keys(rng):
    """sum_j exp(g_(j+1) + ... + g_T) phi(k_j) [v_j, 1], pair by pair in NumPy, in chunks that do not divide T."""
    k, v = (rng.normal(size=(1, 5, 2, n)).astype(np.float32) for n in (3, 2))
    gates = -rng.uniform(size=(1, 5, 2)).astype(np.float32)
    state = jax.jit(functools.partial(ops.state_of, TaylorKernel(), chunk_size=2))(k, v, log_gates=gates)
    features = np.asarray(TaylorKernel().features(jnp.asarray(k.transpose(0, 2, 3, 1))))  # [1, K, P, T]
    for head in range(2):
        decay = [np.exp(gates[0, j + 1 :, head].sum()) for j in range(5)]
        terms = [decay[j] * np.outer(features[0, head, :, j], [*v[0, j, head], 1.0]) for j in range(5)]
        expected = np.sum(terms, axis=0)
        np.testing.assert_allclose(state.state[0, head], expected[:, :2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.normalizer[0, head], expected[:, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 5), -1), ((2, 5, 3), -2), ((2, 2, 3), -2), ((2, 3, 2), -1)])
def test_normalise_and_its_gradient_are_those_of_a_quotient(shape, axis, platform):
    """Rows of one value too, [num, den]; a row that saw nothing is 0 and has no gradient."""
    rng = np.random.default_rng(0)
    extended = np.moveaxis(rng.uniform(0.5, 1.0, size=shape), axis, -1)
    cotangent = rng.normal(size=extended[..., 1:].shape)
    extended[0, 0, -1] = 0.0
    num, den = extended[..., :-1], np.where(extended[..., -1:] == 0, np.inf, extended[..., -1:])
    moved = [jnp.asarray(np.moveaxis(x, -1, axis), jnp.float32) for x in (extended, cotangent)]
    with compiling_for(platform):
        out, pull = jax.vjp(lambda x: normalise(x, axis=axis), moved[0])
        (gradient,) = pull(moved[1])
    expected = np.concatenate([cotangent / den, -(cotangent * num / den**2).sum(-1, keepdims=True)], -1)
    np.testing.assert_allclose(np.moveaxis(out, axis, -1), num / den, rtol=1e-6)
    np.testing.assert_allclose(np.moveaxis(gradient, axis, -1), expected, rtol=2e-6, atol=1e-6)
