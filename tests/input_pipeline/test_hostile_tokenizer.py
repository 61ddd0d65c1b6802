"""Tokenizer files that a stranger made."""

import json

import pytest

from sympow_jax.input_pipeline import tokenizers as tk
from sympow_jax.input_pipeline.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer

MODEL = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1}, "merges": [],
}  # fmt: skip
FILE = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": MODEL,
}  # fmt: skip


def content(**changes) -> bytes:
    return json.dumps(FILE | changes).encode()


def refuse(action, message):
    with pytest.raises(ValueError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_pattern_without_end_stops_with_an_error():
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = HuggingFaceTokenizer(content(pre_tokenizer=split))
    assert tokenizer.encode("aab").tolist() == [0, 0, 1]
    refuse(lambda: tokenizer.encode("a" * 40 + "b"), r"tokenizer\.json: cannot be applied to this text")


@pytest.mark.parametrize("nested", [False, True])
def test_replacements_that_multiply_a_text_are_refused(nested):
    def replace(length):
        part = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * length}
        return {"type": "Sequence", "normalizers": [part, {"type": "Sequence", "normalizers": [part] * nested}]}

    assert HuggingFaceTokenizer(content(normalizer=replace(8))).encode("a").tolist() == [0] * 8 ** (1 + nested)
    refuse(lambda: HuggingFaceTokenizer(content(normalizer=replace(65))), r"replaces one character by up to [0-9,]+")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": MODEL | {"vocab": {"a": 2**32 - 2}}}, {"model": MODEL | {"vocab": {"a": -1}}},
        {"model": MODEL | {"vocab": {}}}, {"model": MODEL | {"vocab": ["a"]}}, {"model": {}}, {"model": None},
        {"model": MODEL | {"merges": [["a", "z"]]}}, {"model": MODEL | {"merges": ["a" * 10**6]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
        {"added_tokens": [{"id": 2**40}]}, {"normalizer": {"type": "Python"}},
    ],
)  # fmt: skip
def test_files_of_the_wrong_kind_are_one_line(changes):
    refuse(lambda: HuggingFaceTokenizer(content(**changes)), r"tokenizer\.json: ")


def test_nesting_and_size_are_bounded(monkeypatch):
    deep = b"[" * 3000 + b"]" * 3000
    refuse(
        lambda: HuggingFaceTokenizer(content().replace(b'"normalizer": null', b'"normalizer": ' + deep)), "recursion"
    )
    monkeypatch.setattr("sympow_jax.input_pipeline.huggingface.MAX_FILE_BYTES", 100)
    refuse(lambda: HuggingFaceTokenizer(content()), "at most 100 are read")


@pytest.mark.parametrize(
    "spec",
    [b"[" * 3000 + b"]" * 3000, b"[]", b"7", b'{"kind": ["byte"]}', b'{"kind": "../../x"}', b'{"kind": "ids"}', b"{",
     b'{"kind": "ids", "vocab_size": "7"}', b'{"kind": "ids", "vocab_size": 1e9}',
        b'{"kind": "gpt2", "json_escape": 0}',
     b'{"kind": "ids", "vocab_size": 99999999999}', b'{"kind": "huggingface", "sha256": "../x"}'],
)  # fmt: skip
def test_specifications_of_the_wrong_kind_are_one_line(spec):
    refuse(lambda: tk.tokenizer_from_files({"spec.json": spec, TOKENIZER_FILE: content()}), "spec|kind|tokenizer")


def test_files_of_a_folder_that_are_too_large_are_named(tmp_path):
    with (tmp_path / "spec.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    refuse(lambda: tk.load_tokenizer(tmp_path), r"spec\.json: has 1,099,511,627,776 bytes; at most")
