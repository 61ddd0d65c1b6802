"""A vocabulary in GPT-2's format, small and without a network."""

import hashlib
import json

import pytest

from sympow_jax.input_pipeline import tokenizers as tk


def fake_gpt2_files() -> dict[str, bytes]:
    """A vocabulary in GPT-2's format: the 256 bytes in its alphabet, one merge, end of text."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    encoder = {c: i for i, c in enumerate(alphabet)} | {"re": 256, "<|endoftext|>": 50256}
    return {"encoder.json": json.dumps(encoder).encode(), "vocab.bpe": b"#version: 0.2\nr e\n"}


@pytest.fixture
def gpt2_folder(tmp_path, monkeypatch):
    files = fake_gpt2_files()
    monkeypatch.setattr(tk, "GPT2_HASHES", {name: hashlib.sha256(files[name]).hexdigest() for name in tk.GPT2_HASHES})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path
