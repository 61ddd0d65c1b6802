"""Hugging Face tokenizers: a `tokenizer.json` of the tokenizers library."""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

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

TOKENIZER_FILE = "tokenizer.json"
_MAX_GROWTH = 64  # of a text by the replacements of a normalizer: a chain of them could make gigabytes of a word
_BOS_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")  # where nothing says it


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; the tokens of a text are those of all of it and of nothing else.

    What the file keeps for other uses is not applied: truncation, padding, templates that add special tokens, and
    sampling (BPE dropout). The name of a special token in a text is ordinary text. Without a known BOS token one id is
    added after the largest. `vocab_size` is the largest id + 1 (ids may have gaps), or what `with_rows` made it.
    `bos_id` and `eos_ids` may come from a file: whatever is no id is refused.
    """

    def __init__(self, content: bytes, *, bos_id: Any = None, eos_ids: Any = ()) -> None:
        self._content = bytes(content)
        self._tokenizer = _plain(self._content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self._size <= MAX_VOCABULARY:
            raise TokenizerError(
                f"{TOKENIZER_FILE}: its ids end at {self._size - 1:,}; legal are 0..{MAX_VOCABULARY - 1:,}"
            )
        named = next((vocabulary[name] for name in _BOS_NAMES if name in vocabulary), None)
        count = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._unrecorded_bos_id = count if named is None else named
        if bos_id is None:
            bos_id = self._size if named is None else named
        if type(bos_id) is not int or not 0 <= bos_id <= self._size:
            raise TokenizerError(f"{SPEC_FILE}: bos_id = {bos_id!r}: must be a whole number of 0..{self._size}")
        if self.has_id(bos_id):
            self._tokenizer.add_special_tokens([self._tokenizer.id_to_token(bos_id)])
        self.eos_ids = _token_ids(eos_ids, self._size)
        self._set_bos(bos_id)
        self._special = _special_names(self._tokenizer, self._content, bos_id)
        self._special_ids = np.asarray(sorted(self._special), np.int64)

    @classmethod
    def from_spec(cls, content: bytes, spec: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """The tokenizer that `spec` describes; without `bos_id` there, BOS is of _BOS_NAMES or the count of ids."""
        tokenizer = cls(content, bos_id=spec.get("bos_id"), eos_ids=spec.get("eos_ids", ()))
        if "bos_id" not in spec:
            tokenizer._set_bos(tokenizer._unrecorded_bos_id)
        if "vocab_size" in spec:
            tokenizer._cut(spec["vocab_size"])
        if tokenizer.spec != spec:
            raise TokenizerError(
                f"{TOKENIZER_FILE}: sha256 {tokenizer.spec['sha256']} is not the {spec.get('sha256')} of the "
                "specification; put back the file that the store or run was made with"
            )
        return tokenizer

    def with_special(self, *, bos_id: int, eos_ids: Sequence[int]) -> "HuggingFaceTokenizer":
        """The same with other tokens that begin and end a text."""
        return HuggingFaceTokenizer(self._content, bos_id=bos_id, eos_ids=eos_ids)

    @property
    def least_rows(self) -> int:
        """See Tokenizer."""
        ordinary = {*self._tokenizer.get_vocab(with_added_tokens=True).values()} - self._special.keys()
        return max(ordinary | {self.bos_id, *self.eos_ids}) + 1

    def with_rows(self, rows: int) -> "HuggingFaceTokenizer":
        """See Tokenizer; the specification says it."""
        if rows >= self.vocab_size:
            return self
        return HuggingFaceTokenizer.from_spec(self._content, self.spec | {"vocab_size": rows})

    def _cut(self, rows: Any) -> None:
        if type(rows) is not int or not self.least_rows <= rows < self.vocab_size:
            legal = f"{self.least_rows}..{self.vocab_size - 1}"
            raise TokenizerError(f"{SPEC_FILE}: vocab_size = {rows!r}: must be a whole number of {legal}, or absent")
        self.vocab_size = self._size = rows
        self.spec["vocab_size"] = rows

    def id_of(self, name: Any) -> int | None:
        """The id of a token, None if there is none of that name."""
        return self._tokenizer.token_to_id(name) if isinstance(name, str) else None

    def name_of(self, number: int) -> str:
        """The name of a token."""
        return self._tokenizer.id_to_token(number)

    def has_id(self, number: Any) -> bool:
        """Whether `number` is the id of a token."""
        return isinstance(number, int) and number >= 0 and self._tokenizer.id_to_token(number) is not None

    def is_special(self, number: Any) -> bool:
        """Whether `number` is the id of a token that no text gives."""
        return self.has_id(number) and int(number) in self._special

    def _set_bos(self, bos_id: int) -> None:
        self.bos_id = bos_id
        self.vocab_size = max(self._size, bos_id + 1)
        self.spec = {"kind": "huggingface", "sha256": hashlib.sha256(self._content).hexdigest()}
        if bos_id != self._unrecorded_bos_id:
            self.spec["bos_id"] = bos_id
        if self.eos_ids:
            self.spec["eos_ids"] = [*self.eos_ids]

    @functools.cached_property
    def _splitting(self) -> Any:
        return _splitting(self._content, self._special.values())

    def encode(self, text: str) -> np.ndarray:
        """Ids of the whole text, without special tokens."""
        ids = self._encode(self._tokenizer, text)
        if np.isin(ids, self._special_ids).any():  # a model that knows the name of a special token as a piece of text
            ids = self._encode(self._splitting, text)
        special = ids[np.isin(ids, self._special_ids)]
        if special.size:
            name = self._special[int(special[0])]
            raise TokenizerError(
                f"{TOKENIZER_FILE}: the text holds {name!r}, which this tokenizer cannot tell from its special token; "
                "take it out of the text, or use another tokenizer"
            )
        return ids

    def _encode(self, tokenizer: Any, text: str) -> np.ndarray:
        with _panics_are_errors():
            return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int | np.integer] | np.ndarray) -> str:
        """The text; special tokens are left out."""
        with _panics_are_errors():
            return self._tokenizer.decode([i for i in np.asarray(ids, np.int64).tolist() if i < self._size])

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name, None where there is none."""
        return next((number for number, special in self._special.items() if special == name), None)

    def vocabulary_files(self) -> dict[str, bytes]:
        """The tokenizer.json."""
        return {TOKENIZER_FILE: self._content}


def _token_ids(ids: Any, size: int) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not all(type(i) is int and 0 <= i < size for i in ids):
        raise TokenizerError(f"{SPEC_FILE}: eos_ids = {ids!r}: must be a list of whole numbers of 0..{size - 1}")
    return tuple(dict.fromkeys(ids))


def _plain(content: bytes) -> Any:
    """The library's tokenizer without what the file keeps for other uses."""
    library = import_text_package("tokenizers")
    if len(content) > MAX_FILE_BYTES:
        raise TokenizerError(f"{TOKENIZER_FILE}: has {len(content):,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        with _panics_are_errors():
            tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
            growth = _growth(json.loads(tokenizer.normalizer.__getstate__())) if tokenizer.normalizer else 1
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{TOKENIZER_FILE}: not a Hugging Face tokenizer ({one_line(error)})") from None
    if growth > _MAX_GROWTH:
        raise TokenizerError(
            f"{TOKENIZER_FILE}: its normalizer replaces one character by up to {growth:,}; legal are {_MAX_GROWTH}"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


@contextlib.contextmanager
def _panics_are_errors() -> Iterator[None]:
    """A panic of the library, which is no Exception, as a TokenizerError: a pattern without end on this text, say.

    A search stops after ten million steps, within half a second.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{TOKENIZER_FILE}: cannot be applied to this text ({str(error)[:200]})") from None


def _growth(normalizer: Mapping[str, Any]) -> int:
    """The most characters that a chain of normalizers can make of one by replacing it."""
    if normalizer["type"] == "Sequence":
        return math.prod(_growth(part) for part in normalizer["normalizers"])
    return max(1, len(normalizer["content"])) if normalizer["type"] == "Replace" else 1


def _special_names(tokenizer: Any, content: bytes, bos_id: int) -> dict[int, str]:
    """Id -> name of the tokens that no text may give.

    The model's unknown token is not among them, unless it is BOS: text gives it for what the model does not know.
    """
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    if type(tokenizer.model).__name__ == "Unigram":
        unknown = json.loads(content)["model"].get("unk_id")
    added = tokenizer.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special and (i != unknown or i == bos_id)}


def _splitting(content: bytes, names: Iterable[str]) -> Any:
    """The tokenizer with one step more before its model: `names` are split after their first character."""
    library = import_text_package("tokenizers")
    tokenizer = _plain(content)
    tokenizer.add_special_tokens(list(names))
    places = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
    if places:
        split = library.pre_tokenizers.Split(library.Regex(places), "isolated")
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, split])
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE of `vocab_size` ids trained on `texts`, `<|endoftext|>` included (id 0)."""
    tokenizers = import_text_package("tokenizers")
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
