"""Greedy decoding is the argmax of the parallel pass, for every variant; one program serves every position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import override
from sympow_jax.generation import Decoder, Sampling, check, sample
from sympow_jax.generation.decoder import CHUNK_SIZES
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.variants import VARIANTS
from tests.models.small import VOCAB, moved, tiny_config

NEW = 256
PROMPTS = (1, 37, 1000)
LONGEST = max(PROMPTS) + NEW
FLAGS = ("position.max_length=1300",)


def make_model(variant, *flags):
    """Parameters away from their initial point, so that greedy text does not repeat one token."""
    model = Model(resolve_implementation(tiny_config(variant, "model.tied_embeddings=false", *flags)), VOCAB)
    return model, jax.device_put(moved(model.init(jax.random.key(1)), 0.3))


def greedy_text(decoder, prompt, new, max_length):
    stream = decoder.start(1, max_length)
    decoder.read(stream, prompt)
    tokens = [prompt]
    for _ in range(new):
        tokens.append(np.asarray(sample(stream.logits, stream.tokens_read, Sampling(temperature=0)))[:, None])
        decoder.read(stream, tokens[-1])
    return np.concatenate(tokens, axis=1)


def assert_greedy(logits, row, prompt_length):
    """Each new token is the argmax of the logits before it; a tie, closer than 1e-3, is the only excuse."""
    logits = np.asarray(logits)[prompt_length - 1 : len(row) - 1]
    new = row[prompt_length:]
    behind = logits.max(axis=1) - np.take_along_axis(logits, new[:, None], axis=1)[:, 0]
    assert behind.max() < 1e-3, f"token {int(behind.argmax())} is {behind.max():.1e} below the most likely one"
    assert (behind > 0).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["softmax_fire", "fox", "conformal_vector_sympow", "selective_rope", "based", "hybrid"]
)
def test_greedy_decoding_is_the_argmax_of_the_parallel_pass(variant):
    """Of the kinds of streams; `check_logits` below compares greedy tokens for every variant."""
    model, params = make_model(variant, *FLAGS)
    decoder, rng = Decoder(model, params), np.random.default_rng(0)
    rows = np.zeros((len(PROMPTS), LONGEST), np.int32)
    for i, length in enumerate(PROMPTS):
        text = greedy_text(decoder, rng.integers(0, VOCAB, (1, length)), NEW, LONGEST)
        rows[i, : length + NEW] = text[0]  # what follows is padding, which earlier tokens do not see
    logits, _ = jax.jit(model.logits)(params, rows)
    for i, length in enumerate(PROMPTS):
        assert_greedy(logits[i], rows[i, : length + NEW], length)
    assert len(decoder._programs) == len(CHUNK_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, "hybrid"])
def test_check_passes_for_every_variant(variant):
    model, params = make_model(variant)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 45)).astype(np.int32)
    worst = max(check.check_layers(model, params, tokens), key=lambda r: r.ratio)
    assert worst.ratio < 1, worst
    difference, agree, total = check.check_logits(model, params, tokens)
    assert agree == total and difference < 1e-2


def test_greedy_decoding_of_a_short_prompt():
    model, params = make_model("conformal_sympow")
    text = greedy_text(Decoder(model, params), np.arange(9)[None] % VOCAB, 15, 0)
    logits, _ = jax.jit(model.logits)(params, text)
    assert_greedy(logits[0], text[0], 9)
    assert len(set(text[0, 9:].tolist())) > 3  # the text goes somewhere


def test_one_program_for_every_position_and_memory_does_not_grow():
    model, params = make_model("conformal_sympow")
    decoder = Decoder(model, params)
    stream = decoder.start(2)
    size = stream.num_bytes
    for length in (8, 1, 1, 9, 72):
        decoder.read(stream, np.ones((2, length), np.int32))
    assert stream.tokens_read == 91 and stream.num_bytes == size
    assert sorted(key[-1] for key in decoder._programs) == [1, 8, 64]


@pytest.mark.slow
def test_reading_in_pieces_is_reading_at_once():
    model, params = make_model("softmax_rope")
    decoder, tokens = Decoder(model, params), np.arange(40)[None] % VOCAB
    logits, _ = jax.jit(model.logits)(params, tokens.astype(np.int32))
    stream = decoder.start(1, 40)
    for start, stop in ((0, 3), (3, 20), (20, 20), (20, 40)):
        decoder.read(stream, tokens[:, start:stop])
        np.testing.assert_allclose(np.asarray(stream.logits)[0], logits[0, stop - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_dynamic_ntk_decodes_as_the_parallel_pass_of_the_same_length(layers):
    """Keys are cached unrotated. A fixed length suits any depth; a growing one the first layer, which reads tokens."""
    flags = (f"model.num_layers={layers}", "position.original_length=8", "position.factor=4.0")
    plain, params = make_model("softmax_rope", *flags)
    model = Model(override(plain.config, {"position.scaling": "dynamic_ntk"}), VOCAB)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, 30)), jnp.int32)
    run = jax.jit(model.logits, static_argnames="length")
    fixed, growing = ([], model.initial_state(1, 30)), ([], model.initial_state(1, 30))
    for t in range(30):
        for (parts, state), length in ((fixed, 30), (growing, 0)):
            logits, after = run(params, tokens[:, t : t + 1], state=state, length=length)
            parts.append(logits[:, 0])
            state.update(after)
    whole, _ = run(params, tokens, length=30)
    np.testing.assert_allclose(jnp.stack(fixed[0], 1), whole, rtol=1e-3, atol=1e-3)
    if layers == 1:
        for t in (5, 12, 29):
            want, _ = run(params, tokens[:, : t + 1])
            np.testing.assert_allclose(growing[0][t], want[:, -1], rtol=1e-3, atol=1e-3)
        assert np.abs(np.asarray(growing[0][12] - whole[:, 12])).max() > 0.01


def test_prompts_of_many_lengths_share_programs():
    """Lengths to 500 tokens and 64 new ones: caches of four sizes, so as many programs a chunk, not one a prompt."""
    model, params = make_model("softmax_rope")
    decoder = Decoder(model, params)
    rooms = {n: decoder.start(1, n + 64).max_length for n in (3, 17, 60, 90, 130, 200, 260, 333, 410, 500)}
    assert sorted({*rooms.values()}) == [128, 256, 512, 1024]
    assert all(n + 64 <= room <= 2 * (n + 64) for n, room in rooms.items())
    assert decoder.start(1, 100_000).max_length == 102_400


def test_what_dynamic_ntk_scales_to_is_what_was_asked_for():
    model, params = make_model("softmax_rope", "position.scaling=dynamic_ntk")
    assert Decoder(model, params).start(1, 100).max_length == 100
