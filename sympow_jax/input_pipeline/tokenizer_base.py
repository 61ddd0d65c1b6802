"""What every tokenizer offers, and its files."""

import abc
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sympow_jax.files import write_bytes_atomic

SPEC_FILE = "spec.json"
MAX_FILE_BYTES = 64 * 2**20
MAX_VOCABULARY = 2**24


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
    eos_ids: tuple[int, ...] = ()  # tokens that end a text, where the tokenizer has any besides BOS

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, [num_tokens] uint16 or uint32, without BOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name, None where there is none."""
        return None

    @property
    def least_rows(self) -> int:
        """Rows of an embedding of every token that a text, BOS or EOS gives; special tokens may lie beyond them."""
        return self.vocab_size

    def with_rows(self, rows: int) -> "Tokenizer":
        """The same without the special tokens from id `rows` on; `rows` is at least `least_rows`."""
        return self

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


def import_text_package(name: str) -> Any:
    """The optional package `name` with the parts that are used here."""
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


def one_line(error: Exception) -> str:
    """The message of an error of another library, cut and without line breaks."""
    return " ".join(str(error).split())[:200]
