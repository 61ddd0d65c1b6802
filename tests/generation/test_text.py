"""Streams of text: characters come whole, stop strings never appear, draws follow their distribution."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sympow_jax.config import ConfigError
from sympow_jax.generation import Sampling, TextStream, sample
from sympow_jax.input_pipeline import tokenizers as tk
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer


class EscapedBytes(ByteTokenizer):
    """Bytes of text with JSON escapes, as LongCrawl64 has them."""

    def decode(self, ids):
        from sympow_jax.input_pipeline.tokenizers import _ESCAPES, _unescape

        return _ESCAPES.sub(_unescape, super().decode(ids))


class WordTokenizer(ByteTokenizer):
    """One token is several words."""

    def decode(self, ids):
        return "zero one two" * len(ids)


def stream_of(content: bytes, tokenizer=None, stop=()):
    stream = TextStream(tokenizer or ByteTokenizer(), stop)
    pieces = [stream.push(byte) for byte in content]
    return pieces, "".join(pieces) + stream.finish(), stream


@pytest.mark.parametrize("text", ["plain", "naïve — 漢字 🙂 end", "a\\b \ufffd", "é" * 300, ""])
def test_characters_come_whole_and_the_text_is_that_of_all_tokens(text):
    pieces, joined, _ = stream_of(text.encode())
    assert joined == text
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")


def test_invalid_bytes_become_replacement_characters_and_nothing_is_lost(rng):
    content = bytes(rng.integers(0, 256, 2000).tolist())
    assert stream_of(content)[1] == content.decode("utf-8", "replace")


def test_escapes_come_whole():
    pieces, joined, _ = stream_of(rb"caf\u00e9 \ud83d\ude42\nend \\ x", EscapedBytes())
    assert joined == "café 🙂\nend \\ x"
    assert not any("\\u" in "".join(pieces[:i]) for i in range(len(pieces)))


def test_text_is_cut_before_the_first_stop_string_and_its_start_is_held_back():
    pieces, joined, stream = stream_of(b"one END two", stop=("EN!", "END"))
    assert joined == "one " and stream.stopped
    assert "".join(pieces[:5]) == "one " and stream.push(65) == ""
    assert stream_of(b"one EN", stop=("END",))[1] == "one EN"
    both = TextStream(WordTokenizer(), ("two", "one"))
    assert both.push(0) == "zero " and both.stopped


def test_bos_ends_the_text():
    stream = TextStream(ByteTokenizer())
    assert stream.push(65) == "A" and stream.push(256) == "" and stream.stopped and stream.push(66) == ""


def byte_fallback() -> tk.HuggingFaceTokenizer:
    """Llama 2's style: pieces with a space in front as U+2581, what is no piece as bytes, the first space stripped."""
    pieces = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdeo", "▁a", "▁b"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    library.add_special_tokens(["<s>", "</s>"])
    return tk.HuggingFaceTokenizer(library.to_str().encode(), bos_id=0, eos_ids=(1,))


def metaspace() -> tk.HuggingFaceTokenizer:
    """T5's style: words that begin with U+2581."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "▁one", "▁two", "▁three"])}
    library = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return tk.HuggingFaceTokenizer(library.to_str().encode(), bos_id=1)


@pytest.mark.parametrize(
    ("make", "prompt", "text"),
    [
        (byte_fallback, "abc de", " a日本 b🙂o"),
        (byte_fallback, "ab日", "本 b"),
        (byte_fallback, "o " * 80, "日" * 90 + " a b"),
        (metaspace, "one two", " three one"),
    ],
)
def test_text_after_a_prompt_is_what_the_whole_text_has_there(make, prompt, text):
    """No space is lost and no character comes in parts, whatever the tokenizer does at the start of a text."""
    tokenizer = make()
    whole = tokenizer.encode(prompt + text).tolist()
    before = len(tokenizer.encode(prompt))
    stream = TextStream(tokenizer, context=whole[:before])
    pieces = [stream.push(token) for token in whole[before:]]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_eos_ends_the_text_and_a_stop_string_may_name_a_special_token():
    tokenizer = byte_fallback()
    a, b = tokenizer.encode("a b").tolist()
    stream = TextStream(tokenizer)
    assert stream.push(a) == "a" and stream.push(1) == "" and stream.stopped and stream.push(b) == ""
    library = metaspace()
    stream = TextStream(library, ("</s>",))
    assert stream.push(2) == "one" and stream.push(1) == "" and stream.stopped


LOGITS = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32))


def frequencies(sampling, draws=4000):
    rows = jnp.asarray(np.repeat(LOGITS, draws, axis=0))
    return np.bincount(np.asarray(sample(rows, 3, sampling)), minlength=4) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, np.asarray([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.81}, np.asarray([0.5, 0.3, 0.15, 0]) / 0.95),
        ({"temperature": 1.0, "top_p": 0.5}, [1, 0, 0, 0]),
        # of 0.685, 0.247, 0.062, 0.007 the first two reach 0.9, of the probabilities at temperature 1 the first three
        ({"temperature": 0.5, "top_p": 0.9}, np.asarray([0.25, 0.09, 0, 0]) / 0.34),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    found = frequencies(Sampling(**options))
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.all(found[np.asarray(expected) == 0] == 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 1e-38}, {"temperature": 1e38}, {"temperature": float("inf")}, {"temperature": float("nan")},
        {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1e-50}, {"top_p": 1.1}, {"top_p": float("nan")},
        {"top_k": -1}, {"seed": -1}, {"seed": 2**32},
    ],
)  # fmt: skip
def test_settings_that_float32_or_sense_cannot_follow_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=re.escape(f"--{name} = {value!r}: must be ")):
        Sampling(**wrong)


def test_the_least_settings_take_the_most_likely_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)) * 1e4, jnp.float32)
    for least in ({"temperature": 1e-6}, {"temperature": 1.0, "top_p": 1e-6}):
        np.testing.assert_array_equal(sample(logits, 3, Sampling(**least)), np.argmax(logits, axis=1))
    Sampling(top_k=50).check_vocabulary(50)
    with pytest.raises(ConfigError, match="--top_k = 51: the vocabulary has 50 tokens"):
        Sampling(top_k=51).check_vocabulary(50)


def test_draws_depend_on_seed_row_and_position_and_on_nothing_else():
    rows = jnp.asarray(np.zeros((8, 1000), np.float32))
    draw = np.asarray(sample(rows, 5, Sampling(temperature=1.0, seed=1)))
    assert len(set(draw)) > 4
    np.testing.assert_array_equal(sample(rows[:3], 5, Sampling(temperature=1.0, seed=1)), draw[:3])
    for other in (
        sample(rows, 6, Sampling(temperature=1.0, seed=1)),
        sample(rows, 5, Sampling(temperature=1.0, seed=2)),
    ):
        assert np.any(np.asarray(other) != draw)


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"top_p": 1.1}, {"top_k": -1}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        Sampling(**options)
