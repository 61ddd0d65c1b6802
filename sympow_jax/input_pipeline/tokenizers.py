"""Text to token ids and back: bytes, GPT-2, and any Hugging Face `tokenizer.json`.

A tokenizer is defined by a few small files (`files`), so that a copy travels with every store and workdir and
nothing is fetched when a checkpoint is read back.
"""

import abc
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sympow_jax.files import write_bytes_atomic

SPEC_FILE = "spec.json"
GPT2_HASHES = {  # sha256, as published with GPT-2 and checked by tiktoken
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BOS_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_ESCAPES = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')
_FORMS = (
    "byte, gpt2, gpt2-json, gpt2:FOLDER, gpt2-json:FOLDER, a tokenizer.json, or a folder that holds a saved tokenizer"
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be found, read or trusted."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds ids 0..vocab_size-1."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class Tokenizer(abc.ABC):
    """What every tokenizer offers; `vocab_size` counts the BOS id too."""

    vocab_size: int
    bos_id: int
    spec: dict[str, Any]

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, [num_tokens] uint16 or uint32, without BOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def vocabulary_files(self) -> dict[str, bytes]:
        """The files that the specification refers to."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Everything needed to load this tokenizer again, by file name."""
        return {SPEC_FILE: _canonical(self.spec), **self.vocabulary_files()}

    @property
    def digest(self) -> str:
        """Sha256 over the files."""
        total = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            total.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return total.hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the files into `folder`, for load_tokenizer."""
        for name, content in self.files().items():
            write_bytes_atomic(pathlib.Path(folder) / name, content)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255 and BOS = 256."""

    vocab_size = 257
    bos_id = 256

    def __init__(self) -> None:
        self.spec = {"kind": "byte"}

    def encode(self, text: str) -> np.ndarray:
        """One id per byte."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
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

    def decode(self, ids: Iterable[int]) -> str:
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
        tiktoken = _import_text_package("tiktoken")
        ranks = _gpt2_ranks(self._files)
        special = {"<|endoftext|>": self.bos_id}
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """BPE ids; `<|endoftext|>` in the text is ordinary text."""
        if self.json_escape:
            text = json.dumps(text)[1:-1]
        return np.asarray(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; an escape that a cut broke stays as it is."""
        text = self._encoding.decode(np.asarray(ids, np.int64).tolist())
        return _ESCAPES.sub(_unescape, text) if self.json_escape else text

    def vocabulary_files(self) -> dict[str, bytes]:
        """GPT-2's own two files."""
        return dict(self._files)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library; without a known BOS token one id is added at the end."""

    def __init__(self, content: bytes) -> None:
        self._content = bytes(content)
        try:
            self._tokenizer = _import_text_package("tokenizers").Tokenizer.from_str(content.decode("utf-8"))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"tokenizer.json: not a Hugging Face tokenizer ({_one_line(error)})") from None
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        known = (self._tokenizer.token_to_id(name) for name in BOS_NAMES)
        self.bos_id = next((i for i in known if i is not None), size)
        self.vocab_size = max(size, self.bos_id + 1)
        self.spec = {"kind": "huggingface", "sha256": hashlib.sha256(self._content).hexdigest()}

    def encode(self, text: str) -> np.ndarray:
        """Ids without the special tokens that a template would add."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens are left out."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return self._tokenizer.decode([i for i in np.asarray(ids, np.int64).tolist() if i < size])

    def vocabulary_files(self) -> dict[str, bytes]:
        """The tokenizer.json."""
        return {"tokenizer.json": self._content}


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
        return tokenizer_from_files(read_folder(path, (SPEC_FILE, "tokenizer.json", *GPT2_HASHES)))
    if path.suffix == ".json" and path.is_file():
        return HuggingFaceTokenizer(path.read_bytes())
    raise TokenizerError(f"tokenizer = {name!r}: not known; use {_FORMS}")


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that `Tokenizer.files` described."""
    if SPEC_FILE not in files:
        raise TokenizerError(f"tokenizer: {SPEC_FILE} is missing among {sorted(files)}; use {_FORMS}")
    spec = json.loads(files[SPEC_FILE])
    kind = spec.get("kind")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "ids":
        return IdTokenizer(int(spec["vocab_size"]))
    if kind == "gpt2":
        return GPT2Tokenizer(files, json_escape=bool(spec["json_escape"]))
    if kind == "huggingface":
        tokenizer = HuggingFaceTokenizer(files.get("tokenizer.json", b""))
        if tokenizer.spec != spec:
            raise TokenizerError(
                f"tokenizer.json: sha256 {tokenizer.spec['sha256']} is not the {spec['sha256']} of {SPEC_FILE}"
            )
        return tokenizer
    raise TokenizerError(f"tokenizer kind = {kind!r}: legal are byte, ids, gpt2, huggingface")


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE of `vocab_size` ids trained on `texts`, `<|endoftext|>` included (id 0)."""
    tokenizers = _import_text_package("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str().encode("utf-8"))


def read_folder(folder: str | pathlib.Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content of those of `names` that exist in `folder`."""
    paths = {name: pathlib.Path(folder) / name for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def _download_gpt2() -> dict[str, bytes]:
    load = _import_text_package("tiktoken").load
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    try:
        return {name: load.read_file_cached(base + name, digest) for name, digest in GPT2_HASHES.items()}
    except Exception as error:  # whatever the network library raises
        raise TokenizerError(
            f"tokenizer = gpt2: its vocabulary could not be fetched; put {' and '.join(GPT2_HASHES)} into tokenizer/ "
            f"in the store (or beside the .bin), or name their folder, gpt2:FOLDER ({_one_line(error)})"
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


def _import_text_package(name: str) -> Any:
    try:
        module = __import__(name)
        if name == "tokenizers":
            for part in ("models", "pre_tokenizers", "decoders", "trainers"):
                __import__(f"tokenizers.{part}")
        else:
            __import__("tiktoken.load")
    except ImportError:
        raise TokenizerError(
            f"the package {name} is needed for this tokenizer: pip install 'sympow_jax[text]'"
        ) from None
    return module


def _canonical(spec: Mapping[str, Any]) -> bytes:
    return (json.dumps(spec, sort_keys=True) + "\n").encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
