"""Softmax attention: every implementation on every case against the float64 oracle, and its invariants."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.softmax_attention.api import fill_in
from sympow_jax.ops.softmax_attention.arg_specs import ARG_SPECS, make_args, make_bias
from sympow_jax.ops.softmax_attention.dispatch import default_block_size
from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.ops.softmax_attention.tiles import cut, ranges, transposed_ranges
from tests.tolerances import assert_bfloat16, assert_close, relative_error

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMS = ({"implementation": "reference"}, {"implementation": "blockwise", "block_size": 16})
MORE = (pytest.mark.slow, pytest.mark.quick)
# in tiles; the rest slow
SOON = ("sinks_packed", "one_token", "strong_gates_window", "packed_window_fire", "all_biases", "gates_window_t5")


def spec_named(name):
    return next(spec for spec in ARG_SPECS if spec.name == name)


@functools.partial(jax.jit, static_argnums=(2, 3))
def forward_and_gradients(arrays, options, window, form, cotangent):
    def loss(arrays):
        out = ops.softmax_attention(**arrays, **options, window=window, **dict(form))
        return (out.astype(cotangent.dtype) * cotangent).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, gradients


def evaluate(spec, form, dtype=jnp.float32):
    """Output and gradients, in the dtype, as float64 NumPy arrays; float64 inputs are the float32 ones widened."""
    arrays, options = make_args(spec, jnp.float32 if dtype == jnp.float64 else dtype)
    shape = (*arrays["q"].shape[:3], arrays["v"].shape[-1])
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    window = options.pop("window")
    with jax.enable_x64(dtype == jnp.float64):
        if dtype == jnp.float64:
            arrays, cotangent = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (arrays, cotangent))
        result = forward_and_gradients(arrays, options, window, tuple(form.items()), cotangent)
        return jax.tree.map(lambda a: np.asarray(a, np.float64), result)


@functools.cache
def oracle(spec):
    return evaluate(spec, FORMS[0], jnp.float64)


def named(result):
    """(name, array) of the output and of every gradient."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(result)]


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        pytest.param(spec, form, id=f"{spec.name}-{form['implementation']}", marks=() if soon else MORE)
        for spec in ARG_SPECS
        for form in FORMS
        for soon in [spec.name in SOON and form is FORMS[1]]
    ],
)
def test_agrees_with_float64_oracle(spec, form):
    expected = oracle(spec)
    scale = np.linalg.norm(expected[1]["v"])
    for (name, a), (_, e) in zip(named(evaluate(spec, form)), named(expected), strict=True):
        assert_close(a, e, "float32", "strong" if "strong" in spec.name else "mild", name=name, scale=scale)


def brute_force(spec):
    """The definition, pair by pair in NumPy."""
    arrays, options = make_args(spec)
    q, k, v, log_gates = (
        None if a is None else np.asarray(a, np.float64) for a in map(arrays.get, ("q", "k", "v", "log_gates"))
    )
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    out = np.zeros((B, T, H, v.shape[-1]))
    ids = np.asarray(options.get("segment_ids", np.ones((B, S), int)))
    q_at = np.asarray(options.get("positions", np.broadcast_to(np.arange(T), (B, T))))
    k_at = np.asarray(options.get("key_positions", q_at))
    bias = (
        None if "bias" not in arrays else np.asarray(arrays["bias"](jnp.asarray(q_at), jnp.asarray(k_at)), np.float64)
    )
    for b in range(B):
        for i in range(T):
            q_id = ids[b, i] if "segment_ids" in options else 1
            seen = [
                j
                for j in range(S)
                if 0 <= k_at[b, j] <= q_at[b, i]
                and (spec.window is None or q_at[b, i] - k_at[b, j] < spec.window)
                and ids[b, j] == q_id != 0
            ]
            for h in range(H if seen else 0):
                weights = []
                for j in seen:
                    logit = q[b, i, h] @ k[b, j, h * K // H] / np.sqrt(D)
                    if bias is not None:
                        logit += bias[b, h, i, j]
                    if log_gates is not None:
                        later = [m for m in seen if k_at[b, m] > k_at[b, j]]
                        logit += log_gates[b, later, h * log_gates.shape[2] // H].sum()
                    weights.append(np.exp(logit))
                sink = np.exp(np.float64(arrays["sinks"][h])) if spec.sinks else 0.0
                out[b, i, h] = np.array(weights) @ v[b, seen, h * K // H] / (sum(weights) + sink)
    return out


@pytest.mark.parametrize(
    "name",
    [
        *("strong_gates_window", "packed_window_fire", "sinks_cache_window"),
        *(pytest.param(name, marks=MORE) for name in ("cache_fire", "gates_per_kv_head", "packed", "cache_window")),
    ],
)
def test_reference_is_the_definition(name):
    spec = spec_named(name)
    np.testing.assert_allclose(oracle(spec)[0], brute_force(spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=["reference", "blockwise"])
@pytest.mark.parametrize("T", [pytest.param(1, marks=MORE), 37, pytest.param(96, marks=MORE)])
def test_forget_gates_match_published_implementation(T, form):
    golden = np.load(GOLDEN / f"softmax_gated_fox_B2H4K2D16T{T}.npz")
    names = ("q", "k", "v", "log_gates")
    arrays = {n: jnp.asarray(golden[n]) for n in names}
    out, gradients = forward_and_gradients(arrays, {}, None, tuple(form.items()), jnp.asarray(golden["cotangent"]))
    scale = np.linalg.norm(golden["grad_v"])
    for name, actual in [("out", out), *((f"grad_{n}", gradients[n]) for n in names)]:
        kind = "outputs" if name in ("out", "grad_v", "grad_log_gates") else "gradients"
        assert_close(actual, golden[name], "golden", kind, name=name, scale=scale)


@pytest.mark.parametrize("form", FORMS, ids=["reference", "blockwise"])
@pytest.mark.parametrize("name", ["gates_per_kv_head", "packed_window_fire"])
def test_gradients_of_invisible_tokens_are_exactly_zero(name, form):
    arrays, options = make_args(spec_named(name))
    T, row = arrays["q"].shape[1], 20
    ids = np.asarray(options.get("segment_ids", np.ones((2, T), int)))
    window = options.pop("window")
    cotangent = jnp.zeros((*arrays["q"].shape[:3], arrays["v"].shape[-1])).at[:, row].set(1.0)
    _, gradients = forward_and_gradients(arrays, options, window, tuple(form.items()), cotangent)
    distance = row - np.arange(T)
    seen = (distance >= 0)[None] & (distance < (window or T))[None] & (ids == ids[:, row : row + 1])
    for key in ("k", "v"):
        nonzero = np.asarray(gradients[key] != 0).any((2, 3))
        np.testing.assert_array_equal(nonzero, seen)
    if "log_gates" in gradients:
        np.testing.assert_array_equal(np.asarray(gradients["log_gates"])[:, row + 1 :], 0.0)
        assert (np.asarray(gradients["log_gates"])[:, 1 : row + 1] != 0).all()


def test_bfloat16_is_as_exact_as_the_dense_form():
    spec = dataclasses.replace(spec_named("gates_per_kv_head"), T=96)
    arrays, _ = make_args(spec, jnp.bfloat16)
    wide = {name: a.astype(jnp.float32) for name, a in arrays.items()}
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 96, 4, 8)), jnp.float32)
    dense, tiled = (evaluate(spec, form, jnp.bfloat16) for form in FORMS)
    exact = forward_and_gradients(wide, {}, None, tuple(FORMS[0].items()), cotangent)
    for (name, gold), (_, reference), (_, test) in zip(named(exact), named(dense), named(tiled), strict=True):
        assert relative_error(reference, gold) < 1e-2, name  # statistics in bfloat16 would be worse than this
        assert_bfloat16(test, reference, gold, name=name)


@pytest.mark.parametrize("form", FORMS, ids=["reference", "blockwise"])
def test_alibi_is_a_fixed_gate(form):
    arrays, _ = make_args(spec_named("plain"))
    B, T, H, _ = arrays["q"].shape
    slopes = jnp.asarray(ops.positions.alibi_slopes(H), jnp.float32)
    biased = attend({**arrays, "bias": ops.positions.alibi_bias(slopes)}, None, tuple(form.items()))
    gated = attend({**arrays, "log_gates": ops.gates.fixed_log_gates(H, B, T)}, None, tuple(form.items()))
    np.testing.assert_allclose(biased, gated, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=(1, 2))
def attend(arguments, window, form):
    return ops.softmax_attention(**arguments, window=window, **dict(form))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 9])
def test_stream_through_a_cache_equals_the_whole(window):
    """Chunks and a token: through preallocated slots, or through the last tokens with empty slots in front."""
    arrays, _ = make_args(dataclasses.replace(spec_named("gates_per_kv_head"), T=40, bias=("fire",)))
    bias = arrays.pop("bias")
    whole = attend({**arrays, "bias": bias}, window, tuple(FORMS[0].items()))
    slots = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32)[None], (2, 40))
    for (start, stop), form in [((0, 20), FORMS[1]), ((20, 40), FORMS[1]), ((39, 40), FORMS[0])]:
        cache, at = arrays, slots
        if window is not None:  # the chunk and the window - 1 tokens before it
            pad = [(0, 0), (8, 0), (0, 0), (0, 0)]
            cache = {n: jnp.pad(a, pad[: a.ndim])[:, start : stop + 8] for n, a in arrays.items()}
            at = jnp.pad(slots, pad[:2], constant_values=-1)[:, start : stop + 8]
        queries = {"q": arrays["q"][:, start:stop], "positions": slots[:, start:stop], "key_positions": at}
        out = attend({**cache, **queries, "bias": bias}, window, tuple(form.items()))
        np.testing.assert_allclose(out, whole[:, start:stop], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=["reference", "blockwise"])
def test_rows_that_see_nothing_are_zero(form):
    arrays, options = make_args(spec_named("packed"))
    window = options.pop("window")
    cotangent = jnp.ones((*arrays["q"].shape[:3], arrays["v"].shape[-1]))
    out, gradients = forward_and_gradients(arrays, options, window, tuple(form.items()), cotangent)
    padding = np.asarray(options["segment_ids"]) == 0
    assert padding.any()
    np.testing.assert_array_equal(np.asarray(out)[padding], 0.0)
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(np.asarray(gradients[name])[padding], 0.0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("closed", [-np.inf, -1e30])
def test_a_closed_gate_is_the_edge_of_a_document(closed):
    form = FORMS[0]
    arrays, _ = make_args(spec_named("gates_per_kv_head"))
    edge = jnp.asarray(np.repeat([[1, 2]], [20, 17], axis=1).repeat(2, 0), jnp.int32)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 37, 4, 8)), jnp.float32)
    expected = forward_and_gradients(arrays, {"segment_ids": edge}, None, tuple(form.items()), cotangent)
    arrays["log_gates"] = arrays["log_gates"].at[:, 20].set(closed)
    actual = forward_and_gradients(arrays, {}, None, tuple(form.items()), cotangent)
    for (name, a), (_, e) in zip(named(actual), named(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=2e-5, err_msg=name)


def test_strong_gates_stay_exact_far_into_the_sequence():
    """Cumulative sums near -160,000, where a float32 sum is off by 1e-2."""
    rng = np.random.default_rng(0)
    log_gates = jnp.asarray(-5 * rng.uniform(size=(1, 65536, 1)), jnp.float32)
    high, low = jax.jit(ops.gates.cumulative_log_gates)(log_gates)
    exact = np.cumsum(np.asarray(log_gates, np.float64), 1)
    total = np.asarray(high, np.float64) + np.asarray(low, np.float64)
    np.testing.assert_allclose(total, exact, rtol=1e-11)
    assert np.abs(np.asarray(high) - exact).max() > 1e-3  # one float alone would not do


def compiled(T, **options):
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)

    def loss(q, k, v):
        return ops.softmax_attention(q, k, v, implementation="blockwise", block_size=128, **options).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()


def test_memory_is_linear_in_length():
    small, large = (compiled(T).temp_size_in_bytes for T in (2048, 4096))
    assert large < 2.1 * small
    assert large < 4096 * 4096 * 4 / 4  # no T x T array of any type


def tile_ranges(T, size, window=None, segments=None):
    @jax.jit
    def both():
        x = jnp.zeros((1, T, 1, 1))
        index = jnp.arange(T, dtype=jnp.int32)
        ids = None if segments is None else (segments, segments)
        inputs = Inputs(x, x, x, None, None, index, index, index[None], index[None], ids)
        rows = cut(inputs, size)[3:]
        return ranges(*rows, window), transposed_ranges(*rows, window)

    return tuple(np.stack(found, 1).tolist() for found in both())


def test_only_tiles_with_visible_pairs_are_visited():
    assert tile_ranges(64, 16) == ([[0, 1], [0, 2], [0, 3], [0, 4]], [[0, 4], [1, 4], [2, 4], [3, 4]])
    assert tile_ranges(64, 16, window=10) == ([[0, 1], [0, 2], [1, 3], [2, 4]], [[0, 2], [1, 3], [2, 4], [3, 4]])
    assert tile_ranges(33, 16)[0] == [[0, 1], [0, 2], [0, 3]]  # the last tile has one token, which sees itself
    # the first query of tile 2, at 32, sees key 16 through a window of 17, and key 15, of tile 0, through one of 18
    assert tile_ranges(64, 16, window=17)[0] == [[0, 1], [0, 2], [1, 3], [2, 4]]
    assert tile_ranges(64, 16, window=18)[0] == [[0, 1], [0, 2], [0, 3], [1, 4]]
    segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 32, axis=1)
    assert tile_ranges(64, 16, segments=segments)[0] == [[0, 1], [0, 2], [2, 3], [2, 4]]


def test_positions_that_are_given_need_not_count_up():
    x, places = jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    for positions, key_positions in ((None, None), (places, None), (places, places)):
        inputs = fill_in(x, x, x, None, None, None, positions, key_positions)
        assert inputs.run == (4 if positions is None else 0)


@pytest.mark.parametrize(("start", "length", "size"), [(100, 10, 64), (8, 16, 24)])
def test_a_bias_of_distance_is_that_of_any_queries(start, length, size):
    """Queries from any place on: their blocks begin elsewhere than those of the keys."""
    S, place = start + length, jnp.arange(start, start + length)
    q, k, v = (jnp.asarray(np.random.default_rng(n).normal(size=(1, S, 2, 4)), jnp.float32) for n in range(3))
    bias = make_bias("kerple_log", 2)
    known = {"query_index": place, "run": length, "bias": bias, "implementation": "blockwise", "block_size": size}
    whole = ops.softmax_attention(q, k, v, bias=bias, implementation="reference")
    np.testing.assert_allclose(ops.softmax_attention_at(q[:, place], k, v, **known), whole[:, place], atol=2e-6)


def test_automatic_choice():
    arrays, _ = make_args(spec_named("plain"))
    chosen = {
        T: "while" in str(jax.make_jaxpr(ops.softmax_attention)(*(jnp.zeros((1, T, 2, 8)),) * 3))
        for T in (16, 128, 129)
    }
    assert chosen == {16: False, 128: False, 129: True}
    np.testing.assert_array_equal(
        ops.softmax_attention(**arrays), ops.softmax_attention(**arrays, implementation="reference")
    )


def test_tiles_of_a_gpu_are_as_large_as_its_cache_holds_of_all_rows_and_heads():
    """Four bytes of each pair: 12.6 MB of 12 heads and 512 x 512 pairs, and of four rows of them and 256 x 256."""

    def size(platform, rows, length):
        with compiling_for(platform):
            return default_block_size((rows, length, 12, 64), length, None)

    assert [size("gpu", rows, 16_384) for rows in (1, 2, 4, 5, 6, 40)] == [512, 256, 256, 256, 128, 128]
    assert [size("gpu", 40, length) for length in (512, 1500)] == [128, 128]
    assert size("cpu", 40, 16_384) == size("tpu", 40, 16_384) == 512


def test_tiles_of_a_bias_that_sees_both_positions_are_small_on_a_cpu():
    """That of FIRE costs what switches within a tile; one of the distance is cut out of a row."""

    def size(platform, bias, length):
        with compiling_for(platform):
            return default_block_size((1, length, 4, 64), length, None, make_bias(bias, 4))

    assert [size("cpu", "fire", length) for length in (1_024, 2_048, 8_192, 16_384)] == [128, 128, 128, 512]
    assert size("cpu", "t5", 2_048) == size("tpu", "fire", 2_048) == 512


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"implementation": "chunked"}, "implementation"),
        ({"block_size": 0}, "block_size"),
        ({"window": 0}, "window"),
        ({"k": jnp.zeros((2, 40, 2, 16)), "v": jnp.zeros((2, 40, 2, 8))}, "key_positions"),
        ({"k": jnp.zeros((2, 32, 3, 16)), "v": jnp.zeros((2, 32, 3, 8))}, "num_heads"),
        ({"log_gates": jnp.zeros((2, 32, 3))}, "log_gates"),
        ({"key_positions": jnp.zeros((2, 32), jnp.int32)}, "positions"),
    ],
)
def test_wrong_arguments_are_one_line_that_names_the_field(change, field):
    arrays, _ = make_args(spec_named("plain"))
    with pytest.raises(ValueError, match=field) as error:
        ops.softmax_attention(**arrays | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"log_gates": jnp.zeros((2, 31, 4))}, "log_gates has shape (2, 31, 4)"),
        ({"v": jnp.zeros((2, 31, 4, 8))}, "v has shape (2, 31, 4, 8)"),
        ({"k": jnp.zeros((2, 32, 4, 8))}, "k has shape (2, 32, 4, 8)"),
        ({"sinks": jnp.zeros(3)}, "sinks has shape (3,)"),
        ({"segment_ids": jnp.ones((2, 31), jnp.int32)}, "segment_ids has shape (2, 31)"),
        ({"positions": jnp.zeros((1, 32), jnp.int32)}, "positions has shape (1, 32)"),
    ],
)
def test_tokens_that_are_missing_are_not_made_up(change, field):
    """Tiles are padded, so a last token without a value, gate or document would be taken for padding."""
    arrays, _ = make_args(spec_named("plain"))
    unchecked = ops.softmax_attention.__wrapped__  # the tests' own check of types comes before
    with pytest.raises(ValueError, match="^" + re.escape(field)):
        unchecked(**arrays | change)
