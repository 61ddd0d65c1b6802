"""Position encodings against published values, NumPy in float64, and their own invariants; gates too."""

import dataclasses
import fractions
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.ops import gates, positions
from sympow_jax.ops.platform import compiling_for
from sympow_jax.ops.positions.relu_mlp import relu_mlp
from sympow_jax.ops.softmax_attention.arg_specs import make_bias

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "positions.npz")


def turns_apart(a, b):
    difference = np.asarray(a, np.float64) - b
    return np.abs(difference - np.round(difference)).max()


# Formulas


@pytest.mark.parametrize("num_heads", [8, 12])
def test_alibi_slopes_match_transformers(num_heads):
    np.testing.assert_allclose(positions.alibi_slopes(num_heads), GOLDEN[f"alibi_slopes_{num_heads}"], rtol=1e-6)


def test_alibi_slopes_of_any_head_count():
    np.testing.assert_allclose(positions.alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
    np.testing.assert_allclose(positions.alibi_slopes(1), [2.0**-8])
    assert all(len(positions.alibi_slopes(n)) == n for n in range(1, 40))
    with pytest.raises(ValueError, match="num_heads=0"):
        positions.alibi_slopes(0)


def test_t5_buckets_match_transformers():
    distance = jnp.asarray(GOLDEN["t5_distance"], jnp.int32)
    np.testing.assert_array_equal(positions.t5_bucket(distance), GOLDEN["t5_bucket_causal_32_128"])
    buckets = np.asarray(positions.t5_bucket(jnp.arange(200, dtype=jnp.int32)))
    starts = [int(np.argmax(buckets == b)) for b in range(17, 32)]
    assert starts == [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert int(positions.t5_bucket(jnp.array(-5, jnp.int32))) == 0


def test_fire_input_matches_published_formula():
    q, d, expected = GOLDEN["fire_query_distance_input_c0.1_T512_eps1e-6"].T
    actual = positions.fire_input(jnp.asarray(q, jnp.int32), jnp.asarray(d, jnp.int32))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    assert float(positions.fire_input(jnp.int32(8191), jnp.int32(2047))) == pytest.approx(0.793871, abs=1e-5)


def test_kerple_is_its_formula():
    distance = jnp.asarray([[0, 1, 7], [-3, 100, 5000]], jnp.int32)
    p, a = np.array([0.5, 2.0]), np.array([0.1, 0.9])
    clipped = np.maximum(np.asarray(distance), 0.0)[None]
    args = {"p": jnp.asarray(p, jnp.float32), "a": jnp.asarray(a, jnp.float32)}
    shape = (2, 1, 1)
    expected = -p.reshape(shape) * np.log1p(a.reshape(shape) * clipped)
    np.testing.assert_allclose(positions.kerple_log(distance, **args), expected, rtol=1e-5)
    expected = -a.reshape(shape) * clipped ** p.reshape(shape)
    np.testing.assert_allclose(positions.kerple_power(distance, **args), expected, rtol=1e-5)
    gradient = jax.grad(lambda args: positions.kerple_power(distance, **args).sum())(args)
    assert all(np.isfinite(g).all() for g in gradient.values())


@pytest.mark.parametrize("num_heads", [8, 12])
def test_sandwich_matches_published_formula(num_heads):
    expected = GOLDEN[f"sandwich_D128_H{num_heads}"]
    distance = jnp.arange(512, dtype=jnp.int32)
    tolerance = 1e-5 * np.abs(expected).max()
    bias, formula = jax.jit(
        lambda d: (
            positions.sandwich_bias(num_heads)(d + 70_000, jnp.array([70_000])),
            positions.sandwich(d, num_heads),
        )
    )(distance)
    np.testing.assert_allclose(formula, expected, atol=tolerance)
    np.testing.assert_allclose(bias[:, :, 0], expected, atol=tolerance)


# Frequencies and phases


@pytest.mark.parametrize("scaling", ["linear", "yarn", "dynamic_ntk"])
def test_rope_scalings_match_transformers(scaling):
    name = f"rope_{scaling.split('_')[0]}_d64_b10000_L2048_s4"
    for length in (8192, jnp.int32(8192)):
        frequencies, factor = positions.rope_frequencies(
            64, scaling=scaling, factor=4.0, original_length=2048, length=length
        )
        np.testing.assert_allclose(frequencies, GOLDEN[f"{name}_inv_freq"], rtol=1e-5)
        assert factor == pytest.approx(float(GOLDEN[f"{name}_attention_factor"]), abs=1e-5)


def test_rope_ntk_and_llama3_are_their_formulas():
    plain, _ = positions.rope_frequencies(64, base=5e5)
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(32) / 32))
    ntk, _ = positions.rope_frequencies(64, scaling="ntk", factor=4.0)
    np.testing.assert_allclose(ntk, (1e4 * 4 ** (64 / 62)) ** (-np.arange(32) / 32))
    llama, factor = positions.rope_frequencies(64, base=5e5, scaling="llama3", factor=8.0, original_length=8192)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(llama[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(llama[wavelength > 8192], plain[wavelength > 8192] / 8)
    middle = (wavelength > 2048) & (wavelength < 8192)
    smooth = (8192 / wavelength - 1) / 3
    np.testing.assert_allclose(llama[middle], ((1 - smooth) * plain / 8 + smooth * plain)[middle])
    assert middle.any() and factor == 1.0
    manifest = positions.manifest_frequencies(64, 4096)
    np.testing.assert_allclose(manifest, 2 * np.pi * 4096.0 ** (-np.arange(32) / 32))


def test_constants_of_yarn_and_llama3_are_in_their_formulas():
    """Pairs are kept or divided by the factor on the two sides of the bounds that the constants set."""
    options = {"base": 1e4, "factor": 8.0, "original_length": 4096}
    plain, _ = positions.rope_frequencies(64)
    turns = 4096 * plain / (2 * np.pi)
    constants = positions.ScalingConstants(low_freq_factor=2.0, high_freq_factor=16.0)
    found, _ = positions.rope_frequencies(64, scaling="llama3", constants=constants, **options)
    kept = np.clip((turns - 2) / 14, 0, 1)
    np.testing.assert_allclose(found, kept * plain + (1 - kept) * plain / 8, rtol=1e-12)
    bounds = {"beta_fast": 100.0, "beta_slow": 3.0}
    low, high = (64 * np.log(4096 / (2 * np.pi * beta)) / (2 * np.log(1e4)) for beta in bounds.values())
    for truncate in (False, True):
        a, b = (np.floor(low), np.ceil(high)) if truncate else (low, high)
        constants = positions.ScalingConstants(**bounds, truncate=truncate, mscale=0.7, mscale_all_dim=0.3)
        found, factor = positions.rope_frequencies(64, scaling="yarn", constants=constants, **options)
        ramp = np.clip((np.arange(32) - a) / (b - a), 0, 1)
        np.testing.assert_allclose(found, plain * (1 - ramp) + plain / 8 * ramp, rtol=1e-12)
        assert factor == pytest.approx((1 + 0.07 * np.log(8)) / (1 + 0.03 * np.log(8)))
    given = positions.ScalingConstants(attention_factor=1.5)
    assert positions.rope_frequencies(64, scaling="yarn", constants=given, **options)[1] == 1.5


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"scaling": "yarm"}, "scaling"),
        ({"scaling": "linear", "factor": 0.5}, "factor"),
        ({"scaling": "yarn", "factor": 2.0}, "original_length"),
        ({"scaling": "dynamic_ntk", "factor": 2.0, "original_length": 8}, "length"),
        ({"head_dim": 2, "scaling": "ntk", "factor": 2.0}, "head_dim"),
    ],
)
def test_wrong_rope_arguments_name_the_field(arguments, field):
    with pytest.raises(ValueError, match=field):
        positions.rope_frequencies(**{"head_dim": 64} | arguments)


@pytest.mark.parametrize("frequencies", [positions.rope_frequencies(64)[0], positions.manifest_frequencies(64, 65536)])
def test_phases_are_exact_at_a_million_tokens(frequencies):
    tokens = np.array([0, 1, 777, 65_537, 1_000_003, -1])
    phases = positions.rope_phases(jnp.asarray(tokens, jnp.int32)[None], frequencies)[0, :, 0]
    per_turn = [fractions.Fraction(f / (2 * np.pi)) for f in frequencies]
    exact = np.array([[float(int(n) * f % 1) for f in per_turn] for n in tokens])
    assert turns_apart(phases, exact) < 1e-6


@jax.jit
def learned(beta, **options):
    return positions.learned_phases(beta, positions.rope_frequencies(16)[0], **options)


def make_beta(T, seed=0):
    return 1 + jnp.tanh(jnp.asarray(np.random.default_rng(seed).normal(size=(2, T, 3)), jnp.float32))


def test_learned_phases_are_the_cumulative_sum_over_any_length():
    beta = make_beta(20_000)
    phases, final = learned(beta)
    steps = np.round(np.asarray(beta, np.float64) * 2**30).astype(np.int64).cumsum(1)
    frequencies = positions.rope_frequencies(16)[0] / (2 * np.pi)
    assert turns_apart(phases, (steps / 2**30)[..., None] * frequencies) < 1e-6
    np.testing.assert_array_equal(
        np.asarray(final.integer, np.int64) * 2**30 + np.asarray(final.fraction), steps[:, -1]
    )


def test_learned_phases_start_anywhere_up_to_a_million_tokens():
    """A stream at position 1,234,567.891 continues as exactly as it began."""
    start = fractions.Fraction(1_234_567) + fractions.Fraction(956_722_026, 2**30)
    state = positions.PhaseState(
        jnp.full((2, 3), 1_234_567, jnp.uint32), jnp.full((2, 3), 956_722_026, jnp.uint32), jnp.zeros(2, jnp.int32)
    )
    beta = make_beta(5)
    phases, _ = learned(beta, initial=state)
    steps = np.round(np.asarray(beta, np.float64) * 2**30).astype(np.int64).cumsum(1)
    per_turn = [fractions.Fraction(f / (2 * np.pi)) for f in positions.rope_frequencies(16)[0]]
    exact = [[float((start + fractions.Fraction(int(n), 2**30)) * f % 1) for f in per_turn] for n in steps.ravel()]
    assert turns_apart(phases, np.array(exact).reshape(phases.shape)) < 1e-6


def test_learned_phases_are_bit_equal_in_chunks_and_after_resets():
    beta = make_beta(60)
    ids = jnp.asarray(np.r_[np.full(25, 1), np.full(20, 2), np.full(15, 3)][None].repeat(2, 0), jnp.int32)
    for options in ({}, {"segment_ids": ids}):
        whole, end = learned(beta, **options)
        state, parts = positions.initial_phase_state(2, 3), []
        for low, high in [(0, 20), (20, 40), (40, 60)]:
            chunk = {name: a[:, low:high] for name, a in options.items()}
            part, state = learned(beta[:, low:high], initial=state, **chunk)
            parts.append(part)
        np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
        jax.tree.map(np.testing.assert_array_equal, state, end)
    np.testing.assert_array_equal(
        whole[:, 25:45], learned(beta[:, 25:45], initial=positions.initial_phase_state(2, 3))[0]
    )


def test_gradient_of_learned_phases_is_that_of_the_sum():
    beta, cotangent = make_beta(60), jnp.asarray(np.random.default_rng(1).normal(size=(2, 60, 3, 8)), jnp.float32)
    ids = jnp.asarray(np.r_[np.full(25, 1), np.full(35, 2)][None].repeat(2, 0), jnp.int32)
    actual = jax.jit(jax.grad(lambda b: (learned(b, segment_ids=ids)[0] * cotangent).sum()))(beta)
    weights = np.asarray(cotangent, np.float64) @ (positions.rope_frequencies(16)[0] / (2 * np.pi))
    expected = np.concatenate([part[:, ::-1].cumsum(1)[:, ::-1] for part in (weights[:, :25], weights[:, 25:])], 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frequencies", [(), (8,)])
def test_gradient_of_learned_phases_goes_through_a_differentiable_state(frequencies):
    """Chunks of 20 tokens, one of documents' ends within and one with an end between two; without twins it stops."""
    beta, draw = make_beta(60), np.random.default_rng(1)
    beta = jnp.broadcast_to(beta.reshape(*beta.shape, *[1] * len(frequencies)), (*beta.shape, *frequencies))
    cotangent = jnp.asarray(draw.normal(size=(2, 60, 3, 8)), jnp.float32)
    ids = jnp.asarray([np.repeat([1, 2], [25, 35]), np.repeat([1, 2, 3, 4], [20, 22, 8, 10])], jnp.int32)

    def loss(beta, state, size, segmented):
        total = 0.0
        for low in range(0, 60, size):
            of = slice(low, low + size)
            options = {"segment_ids": ids[:, of]} if segmented else {}
            phases, state = learned(beta[:, of], initial=state, **options)
            total += (phases * cotangent[:, of]).sum()
        return total

    start = positions.initial_phase_state(2, 3, *frequencies)
    gradient = jax.jit(jax.grad(loss), static_argnums=(2, 3))
    for segmented in (False, True):
        expected = gradient(beta, start, 60, segmented)
        actual = gradient(beta, positions.differentiable({"phase": start})["phase"], 20, segmented)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(gradient(beta, start, 20, segmented) - expected)[:, :20].max() > 1e-2


def test_rotation_depends_on_differences_and_keeps_half_split_pairs():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 4, 16)), jnp.float32) for _ in range(2))
    frequencies, _ = positions.rope_frequencies(16)

    def rotate(x, position):
        return positions.rotate(x, positions.rope_phases(jnp.array([[position]], jnp.int32), frequencies))

    near, far = (rotate(q, 5 + n) * rotate(k, n) for n in (0, 100_000))
    np.testing.assert_allclose(near.sum(-1), far.sum(-1), atol=1e-4)
    rotated = np.asarray(rotate(q, 3))[0, 0]
    pairs = np.asarray(q)[0, 0, :, :8] + 1j * np.asarray(q)[0, 0, :, 8:]
    expected = pairs * np.exp(3j * frequencies)
    np.testing.assert_allclose(rotated[:, :8] + 1j * rotated[:, 8:], expected, atol=1e-5)


def test_steps_of_a_frequency_are_those_of_heads_with_that_frequency_alone():
    """Phases, states and gradients of beta [B, T, K, F], over documents and a continued stream, bit for bit."""
    beta = jnp.stack([make_beta(40) * (0.3 + 0.08 * f) for f in range(8)], axis=-1)
    segments = jnp.asarray(np.repeat([[0, 1, 2]], 2, 0).repeat([7, 20, 13], axis=1), jnp.int32)
    weights = jax.random.normal(jax.random.key(5), beta.shape)
    _, state = learned(beta[:, :25], segment_ids=segments[:, :25])
    rest, final = learned(beta[:, 25:], segment_ids=segments[:, 25:], initial=state)
    gradient = jax.grad(lambda b: jnp.sum(weights * learned(b, segment_ids=segments)[0]))(beta)
    for f in (0, 7):
        phases, end = learned(beta[..., f], segment_ids=segments)
        np.testing.assert_array_equal(rest[..., f], phases[:, 25:, :, f])
        np.testing.assert_array_equal(final.integer[..., f], end.integer)
        np.testing.assert_array_equal(final.fraction[..., f], end.fraction)
        alone = weights.at[..., jnp.arange(8) != f].set(0.0)
        expected = jax.grad(lambda b, w=alone: jnp.sum(w * learned(b, segment_ids=segments)[0]))(beta[..., f])
        np.testing.assert_allclose(gradient[..., f], expected, rtol=1e-5, atol=1e-6)


def test_query_heads_share_the_phases_of_their_kv_head():
    x = jnp.ones((2, 5, 6, 16))
    phases, _ = learned(make_beta(5))
    rotated = np.asarray(positions.rotate(x, phases))
    np.testing.assert_array_equal(rotated[:, :, 0], rotated[:, :, 1])
    assert np.abs(rotated[:, :, 1] - rotated[:, :, 2]).max() > 0.1


def test_sinusoidal_is_vaswani():
    out = positions.sinusoidal(jnp.array([[0, 3, 50_000]], jnp.int32), 8)
    angles = np.array([0, 3, 50_000])[:, None] * 1e4 ** (-np.arange(4) / 4)
    expected = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(3, 8)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


# Biases


@pytest.mark.parametrize(
    ("low", "high", "platform"), [(0.0, 1.0, "cpu"), (0.0, 1.0, "tpu"), (0.30, 0.31, "cpu"), (-0.5, 0.0, "cpu")]
)
def test_relu_mlp_is_the_mlp(low, high, platform):
    rng = np.random.default_rng(0)
    shapes = {"kernel_in": (32,), "bias_in": (32,), "kernel_out": (32, 3), "bias_out": (3,)}
    params = {name: jnp.asarray(rng.uniform(-1, 1, size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.uniform(low, high, size=(5, 7)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32)

    def plain(x, kernel_in, bias_in, kernel_out, bias_out):
        hidden = jax.nn.relu(x[:, :, None] * kernel_in[None, None] + bias_in[None, None])
        return jnp.moveaxis(hidden @ kernel_out + bias_out[None, None], -1, 0)

    @jax.jit
    def values_and_gradients(*arguments):
        pulls = [jax.vjp(f, *arguments) for f in (relu_mlp, plain)]
        return [(value, pull(cotangent)) for value, pull in pulls]

    with compiling_for(platform):
        (actual, gradients), (expected, expected_gradients) = values_and_gradients(x, *params.values())
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    for a, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5)


@pytest.mark.parametrize("kind", ["kerple_log", "kerple_power", "t5", "fire"])
def test_learned_biases_start_in_the_published_range(kind):
    params = jax.jit(lambda key: positions.init_bias(kind, key, 64))(jax.random.key(0))
    ranges = {
        "kerple_log": {"p": (0, 2), "a": (0, 1)},
        "kerple_power": {"p": (0, 2), "a": (0, 1)},
        "t5": {"table": (-0.1, 0.1)},
        "fire": {
            **{name: (-1, 1) for name in ("kernel_in", "bias_in")},
            **{name: (-(32**-0.5), 32**-0.5) for name in ("kernel_out", "bias_out")},
            "c": (0.09, 0.11),
            "threshold": (0.99, 1.01),
        },
    }[kind]
    assert params.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        value = np.asarray(params[name])
        assert value.min() >= low and value.max() <= high
        assert value.size < 64 or value.max() - value.min() > 0.6 * (high - low)
    places = jnp.arange(4, dtype=jnp.int32), jnp.arange(6, dtype=jnp.int32)
    bias = jax.jit(lambda params: positions.learned_bias(kind, params)(*places))(params)
    assert bias.shape == (64, 4, 6) and bias.dtype == jnp.float32 and np.isfinite(bias).all()
    with pytest.raises(ValueError, match="alibi"):
        positions.init_bias("alibi", jax.random.key(0), 4)


def test_fires_bias_is_its_mlp_of_the_distance_over_the_512th(rng):
    """psi(d) / psi(max(i, 512)) with psi(x) = ln(1 + 0.1 x) at first, through relu(x w + b) W + B."""
    q, k = np.array([100, 900]), np.array([3, 90])

    @jax.jit
    def bias(key):
        params = positions.init_bias("fire", key, 2)
        return params, positions.learned_bias("fire", params)(jnp.asarray(q, jnp.int32), jnp.asarray(k, jnp.int32))

    params, found = bias(jax.random.key(0))
    w, b, W, B = (np.asarray(params[name]) for name in ("kernel_in", "bias_in", "kernel_out", "bias_out"))
    for i, reach in enumerate((512, 900)):
        x = np.log1p(0.1 * (q[i] - k)) / np.log1p(0.1 * reach)
        hidden = np.maximum(x[:, None] * w + b, 0)
        np.testing.assert_allclose(found[:, i], (hidden @ W + B).T, rtol=1e-4, atol=1e-5)


def test_kerple_parameters_are_projected_and_can_come_back():
    params = {"p": jnp.array([-1.0, 3.0]), "a": jnp.array([-1.0, 0.5])}
    q, k = jnp.array([5], jnp.int32), jnp.array([1], jnp.int32)
    log = positions.learned_bias("kerple_log", params)(q, k)[:, 0, 0]
    np.testing.assert_allclose(log, [-0.01 * np.log1p(0.04), -3 * np.log1p(2.0)], rtol=1e-5)
    power = positions.learned_bias("kerple_power", params)(q, k)[:, 0, 0]
    np.testing.assert_allclose(power, [-0.01 * 4**0.01, -0.5 * 4**2], rtol=1e-5)
    gradient = jax.grad(lambda p: positions.learned_bias("kerple_power", p)(q, k).sum())(params)
    assert all((np.asarray(g) != 0).all() for g in gradient.values())


@pytest.mark.parametrize(("first_query", "first_key"), [(49, 14), (49, 0), (8, 14)])
def test_biases_of_the_distance_are_the_same_along_diagonals(rng, first_query, first_key):
    """Values and gradients over consecutive positions, from one row, against those pair by pair: blocks of 7 of 56."""
    biases = {kind: make_bias(kind, 3) for kind in ("alibi", "kerple_log", "kerple_power", "t5", "sandwich")}
    places = first_query + jnp.arange(7, dtype=jnp.int32), first_key + jnp.arange(7, dtype=jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(3, 7, 7)), jnp.float32)

    @jax.jit
    def both(biases):
        def evaluate(bias, at):
            out, pull = jax.vjp(lambda params: at(dataclasses.replace(bias, params=params))(*places), bias.params)
            return out, pull(cotangent)

        forms = lambda bias: bias, lambda bias: bias.on_consecutive(56, 7)
        return [[evaluate(bias, at) for at in forms] for bias in biases.values()]

    for kind, (pairs, row) in zip(biases, both(biases), strict=True):
        for expected, found in zip(jax.tree.leaves(pairs), jax.tree.leaves(row), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=kind)
    assert biases["t5"].on_consecutive(8, 4).params.shape == (3, 16)
    fire = make_bias("fire", 3)
    assert fire.on_consecutive(8, 4) is fire  # it depends on the query's position too


# Gates


def test_gates_are_log_sigmoids_in_float32():
    data = gates.data_log_gates(jnp.array([[[-30.0, 7.0, 0.0]]], jnp.bfloat16))
    assert data.dtype == jnp.float32
    np.testing.assert_allclose(data[0, 0], [-30.0, -np.log1p(np.exp(-7.0)), -np.log(2.0)], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(gates.POWER_GATE_BIAS), 0.999, rtol=1e-6)
    head = gates.head_log_gates(jnp.asarray(gates.time_scale_logits(3, 4.0, 64.0)), 2, 5)
    assert head.shape == (2, 5, 3)
    np.testing.assert_allclose(head[0, 0], [-1 / 4, -1 / 16, -1 / 64], rtol=1e-4)
    fixed = gates.fixed_log_gates(6, 2, 5)
    np.testing.assert_allclose(fixed[1, 4], -positions.alibi_slopes(6), rtol=1e-6)
    with pytest.raises(ValueError, match="shortest=8"):
        gates.time_scale_logits(3, 8.0, 4.0)


def test_tables_of_long_phases_are_loops_on_a_cpu_with_the_values_and_gradients_of_short_ones():
    phases = jax.random.uniform(jax.random.key(0), (2, 256, 4, 8), minval=-0.5)  # 2^14
    weights = jax.random.normal(jax.random.key(1), (2, *phases.shape))

    def total(phases):
        return sum(jnp.sum(w * table) for w, table in zip(weights, positions.cos_sin(phases), strict=True))

    np.testing.assert_allclose(positions.cos_sin(phases)[0], np.cos(2 * np.pi * np.asarray(phases)), atol=1e-6)
    expected = 2 * np.pi * (weights[1] * jnp.cos(2 * np.pi * phases) - weights[0] * jnp.sin(2 * np.pi * phases))
    np.testing.assert_allclose(jax.grad(total)(phases), expected, atol=1e-4)
    assert "scan" in str(jax.make_jaxpr(positions.cos_sin)(phases))
    with compiling_for("tpu"):
        assert "scan" not in str(jax.make_jaxpr(positions.cos_sin)(phases))
