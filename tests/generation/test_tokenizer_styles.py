"""Text in the styles of known tokenizers: it streams as it decodes, wherever the prompt ends."""

import functools

import pytest

from sympow_jax.generation import TextStream
from sympow_jax.input_pipeline.tokenizers import HuggingFaceTokenizer
from tests.input_pipeline.tokenizer_styles import STYLES, TEXT


@functools.cache
def tokenizer_of(style: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(STYLES[style]().encode())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("before", [0, 1, 5, 64])
def test_streamed_text_is_decoded_text_without_parts_of_characters(style, before):
    tokenizer = tokenizer_of(style)
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, context=ids[:before])
    pieces = [stream.push(token) for token in ids[before:]]
    pieces.append(stream.finish())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids[:before]).rstrip("\ufffd") + "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
