"""Text to token ids and back: bytes, GPT-2, and any Hugging Face `tokenizer.json`.

A tokenizer is defined by a few small files (`files`), so that a copy travels with every store and workdir and
nothing is fetched when a checkpoint is read back.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sympow_jax.files import entry, parse_json
from sympow_jax.input_pipeline.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer, train_bpe
from sympow_jax.input_pipeline.huggingface_folder import read_huggingface_folder
from sympow_jax.input_pipeline.tokenizer_base import (
    MAX_FILE_BYTES,
    MAX_VOCABULARY,
    SPEC_FILE,
    Tokenizer,
    TokenizerError,
    import_text_package,
    one_line,
    token_dtype,
)

__all__ = [
    "GPT2_HASHES",
    "SPEC_FILE",
    "ByteTokenizer",
    "GPT2Tokenizer",
    "HuggingFaceTokenizer",
    "IdTokenizer",
    "Tokenizer",
    "TokenizerError",
    "load_tokenizer",
    "read_folder",
    "token_dtype",
    "tokenizer_from_files",
    "train_bpe",
]
GPT2_HASHES = {  # sha256, as published with GPT-2 and checked by tiktoken
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_ESCAPES = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')
_FORMS = (
    "byte, gpt2, gpt2-json, gpt2:FOLDER, gpt2-json:FOLDER, a tokenizer.json, a Hugging Face tokenizer's folder with "
    "one, or a folder that holds a saved tokenizer"
)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255 and BOS = 256."""

    vocab_size = 257
    bos_id = 256

    def __init__(self) -> None:
        self.spec = {"kind": "byte"}

    def encode(self, text: str) -> np.ndarray:
        """One id per byte."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text; BOS is left out."""
        return bytes(i for i in np.asarray(ids, np.int64).tolist() if i < 256).decode("utf-8", "replace")


class IdTokenizer(Tokenizer):
    """Token ids as decimal numbers with spaces between them, for synthetic tasks; BOS = 0."""

    bos_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.spec = {"kind": "ids", "vocab_size": vocab_size}

    def encode(self, text: str) -> np.ndarray:
        """The numbers in `text`."""
        words = text.split()
        for word in words:
            if not (word.isdecimal() and int(word) < self.vocab_size):
                raise TokenizerError(f"{word!r}: the text must be numbers of 0..{self.vocab_size - 1} and spaces")
        return np.asarray([int(word) for word in words], token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The ids as numbers."""
        return " ".join(str(int(i)) for i in np.asarray(ids, np.int64).tolist())


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, 50,257 ids, BOS = 50256 (`<|endoftext|>`).

    With `json_escape` text is escaped as inside a JSON string first, LongCrawl64's convention: a newline is the
    two characters backslash and n, and what is not ASCII is backslash, u and four hexadecimal digits.
    """

    vocab_size = 50257
    bos_id = 50256

    def __init__(self, files: Mapping[str, bytes], *, json_escape: bool = False) -> None:
        for name, digest in GPT2_HASHES.items():
            if name not in files:
                raise TokenizerError(
                    f"gpt2 tokenizer: {name} is missing; give a folder that holds {' and '.join(GPT2_HASHES)}"
                )
            actual = hashlib.sha256(files[name]).hexdigest()
            if actual != digest:
                raise TokenizerError(
                    f"gpt2 tokenizer: {name} has sha256 {actual}, not GPT-2's {digest}; fetch the file again"
                )
        self.json_escape = json_escape
        self.spec = {"kind": "gpt2", "json_escape": json_escape}
        self._files = {name: bytes(files[name]) for name in GPT2_HASHES}

    @functools.cached_property
    def _encoding(self) -> Any:
        tiktoken = import_text_package("tiktoken")
        ranks = _gpt2_ranks(self._files)
        special = {"<|endoftext|>": self.bos_id}
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """BPE ids; `<|endoftext|>` in the text is ordinary text."""
        if self.json_escape:
            text = json.dumps(text)[1:-1]
        return np.asarray(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text; an escape that a cut broke stays as it is."""
        text = self._encoding.decode(np.asarray(ids, np.int64).tolist())
        return _ESCAPES.sub(_unescape, text) if self.json_escape else text

    def vocabulary_files(self) -> dict[str, bytes]:
        """GPT-2's own two files."""
        return dict(self._files)


def load_tokenizer(spec: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `spec` names: byte, `gpt2[-json][:FOLDER]`, a tokenizer.json, or a folder written by `save`.

    `gpt2` without a folder asks tiktoken, which downloads the vocabulary or finds it in TIKTOKEN_CACHE_DIR.
    """
    name = str(spec)
    if name == "byte":
        return ByteTokenizer()
    kind, _, folder = name.partition(":")
    if kind in ("gpt2", "gpt2-json"):
        files = read_folder(folder, GPT2_HASHES) if folder else _download_gpt2()
        return GPT2Tokenizer(files, json_escape=kind == "gpt2-json")
    path = pathlib.Path(name)
    if path.is_dir():
        return _load_folder(path)
    if path.name == TOKENIZER_FILE and path.is_file():
        return _load_folder(path.parent)  # the files beside it say which token is BOS
    if path.suffix == ".json" and path.is_file():
        return HuggingFaceTokenizer(path.read_bytes())
    raise TokenizerError(f"tokenizer = {name!r}: not known; use {_FORMS}")


def _load_folder(folder: pathlib.Path) -> Tokenizer:
    """A folder written by `save`, by transformers, or with GPT-2's two files."""
    files = read_folder(folder, (SPEC_FILE, TOKENIZER_FILE, *GPT2_HASHES))
    if SPEC_FILE not in files and TOKENIZER_FILE in files:
        return read_huggingface_folder(folder)
    if files and SPEC_FILE not in files:
        return GPT2Tokenizer(files)
    return tokenizer_from_files(files)


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that `Tokenizer.files` described."""
    if SPEC_FILE not in files:
        raise TokenizerError(
            f"tokenizer: {SPEC_FILE} is missing among {sorted(files)}, and there is no {TOKENIZER_FILE}; use {_FORMS}"
        )
    spec = parse_json(files[SPEC_FILE], SPEC_FILE)
    kind = spec.get("kind")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "ids":
        return IdTokenizer(entry(spec, "vocab_size", int, SPEC_FILE, least=1, most=MAX_VOCABULARY))
    if kind == "gpt2":
        return GPT2Tokenizer(files, json_escape=entry(spec, "json_escape", bool, SPEC_FILE))
    if kind == "huggingface":
        return HuggingFaceTokenizer.from_spec(files.get(TOKENIZER_FILE, b""), spec)
    raise TokenizerError(f"tokenizer kind = {kind!r}: legal are byte, ids, gpt2, huggingface")


def read_folder(folder: str | pathlib.Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content of those of `names` that exist in `folder`."""
    paths = [pathlib.Path(folder) / name for name in names]
    large = [path for path in paths if path.is_file() and path.stat().st_size > MAX_FILE_BYTES]
    if large:
        raise TokenizerError(f"{large[0]}: has {large[0].stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _download_gpt2() -> dict[str, bytes]:
    load = import_text_package("tiktoken").load
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    try:
        return {name: load.read_file_cached(base + name, digest) for name, digest in GPT2_HASHES.items()}
    except Exception as error:  # whatever the network library raises
        raise TokenizerError(
            f"tokenizer = gpt2: its vocabulary could not be fetched; put {' and '.join(GPT2_HASHES)} into tokenizer/ "
            f"in the store (or beside the .bin), or name their folder, gpt2:FOLDER ({one_line(error)})"
        ) from None


def _gpt2_ranks(files: Mapping[str, bytes]) -> dict[bytes, int]:
    """Token bytes -> id. GPT-2 writes each byte as one printable character; ids are those of encoder.json."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    encoder = json.loads(files["encoder.json"])
    del encoder["<|endoftext|>"]
    return {bytes(alphabet[c] for c in token): rank for token, rank in encoder.items()}


def _unescape(match: re.Match) -> str:
    text = json.loads(f'"{match[0]}"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
