"""Files of token ids alone, read by what their own bytes say: what they do not say is asked for, never guessed.

- shards of llm.c and modded-nanogpt: 256 int32 of header (magic, version, count), then the tokens (Karpathy, llm.c).
- Megatron's `.bin` with its index `.idx` (Shoeybi et al., Megatron-LM, 2019): number type, sequences, documents.
- NumPy's `.npy`.
- nanoGPT's raw `.bin`: uint16 and nothing else. It says nothing of itself: content that is plainly another is refused.
"""

import dataclasses
import functools
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from sympow_jax.files import file_sha256, one_line
from sympow_jax.input_pipeline.chunked_array import TOKENIZER_FOLDER
from sympow_jax.input_pipeline.megatron import read_index
from sympow_jax.input_pipeline.metadata import StoreError
from sympow_jax.input_pipeline.token_file_content import HEAD, foreign, samples
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer

SUFFIXES = (".bin", ".npy")
DEFAULT_DTYPE = "<u2"
OPTIONS = {"dtype": "", "tokenizer": ""}  # of an address
_HEADER_BYTES = 256 * 4
_SHARDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, number type; the first is GPT-2's
_NAME_DTYPE = "name the number type, as in FILE?dtype=int32 (config) or --dtype=int32 (prepare.py)"


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An opened file.

    kind: "nanogpt", "llm.c", "megatron" or "npy". tokens: [num_tokens] integers of the file's own type, mapped, not
    read. offsets: [documents + 1] where each document starts, and the end, if the file says it. is_gpt2: GPT-2's
    vocabulary is what the format means when nothing else is said.
    """

    path: str
    kind: str
    tokens: np.ndarray
    is_gpt2: bool
    offsets: np.ndarray | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the file, with the number type where the file does not say it and it is not uint16."""
        stated = self.kind in ("llm.c", "npy") or self.tokens.dtype == np.dtype(DEFAULT_DTYPE)
        return file_sha256(self.path) + ("" if stated else f"/{self.tokens.dtype.str}")

    def check(self, tokens: np.ndarray, vocab_size: int, place: int) -> None:
        """Raise StoreError for the first of `tokens`, which begin at `place`, that is no id below vocab_size."""
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            first = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
            raise StoreError(
                f"token file {self.path!r}: token {tokens.reshape(-1)[first]} at {place + first}, but vocab_size = "
                f"{vocab_size}; name the tokenizer that made the tokens, or the number type ({self.tokens.dtype.name} "
                "was read)"
            )

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in tokenizer/ beside the file; None for GPT-2's, if the format means it; else StoreError."""
        folder = pathlib.Path(self.path).parent / TOKENIZER_FOLDER
        if folder.is_dir():
            return load_tokenizer(folder)
        if not self.is_gpt2:
            raise StoreError(
                f"token file {self.path!r}: {self.tokens.dtype.name} tokens ({self.kind}) of an unknown vocabulary; "
                "put the tokenizer's files into tokenizer/ beside it, or name it: FILE?tokenizer=FOLDER in a config, "
                "--tokenizer=FOLDER for prepare.py"
            )
        return None


def is_token_file(address: str) -> bool:
    """Whether `address` is that of a token file, FILE or FILE?dtype=...&tokenizer=..."""
    return address.partition("?")[0].endswith(SUFFIXES)


def open_token_file(path: str, *, dtype: str = "") -> TokenFile:
    """The file at `path`; `dtype` is the number type of a raw one, as NumPy names it.

    Raises StoreError for what is missing, empty, cut, inconsistent, not tokens, or of a number type that must be named.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise StoreError(f"token file {path!r}: no such file")
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    magic = int.from_bytes(head[:4], "little")
    index = file.with_suffix(".idx")
    if magic in _SHARDS:
        kind, found = "llm.c", _open_shard(path, size, head, magic)
    elif head.startswith(b"\x93NUMPY"):
        kind, found = "npy", _open_npy(path)
    elif index.is_file():
        kind, found = "megatron", _open_megatron(path, size, index)
    else:
        return _open_raw(path, size, head, dtype)
    if dtype:
        raise StoreError(
            f"token file {path!r}: says itself that it is {kind} of {found.tokens.dtype.name}; leave out dtype"
        )
    return found


def _open_shard(path: str, size: int, head: bytes, magic: int) -> TokenFile:
    version, number = _SHARDS[magic]
    expected = np.dtype(number)
    if size < _HEADER_BYTES:
        raise StoreError(
            f"token file {path!r}: {size} bytes, shorter than its header of {_HEADER_BYTES}; fetch it again"
        )
    found_version, count = struct.unpack("<2i", head[4:12])
    if found_version != version:
        raise StoreError(f"token file {path!r}: version {found_version} under magic {magic}; {version} can be read")
    there = (size - _HEADER_BYTES) / expected.itemsize
    if count != there or count < 1:
        raise StoreError(
            f"token file {path!r}: its header says {count:,} tokens of {expected.name}, the file holds {there:,.10g}; "
            "fetch it again"
        )
    tokens = np.memmap(path, expected, mode="r", offset=_HEADER_BYTES)
    return TokenFile(path, "llm.c", tokens, is_gpt2=number == "<u2")


def _open_npy(path: str) -> TokenFile:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise StoreError(f"token file {path!r}: damaged .npy ({one_line(error)})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise StoreError(
            f"token file {path!r}: shape {list(tokens.shape)} of {tokens.dtype}, one row of whole numbers is needed"
        )
    return TokenFile(path, "npy", tokens, is_gpt2=tokens.dtype == np.uint16)


def _open_megatron(path: str, size: int, index: pathlib.Path) -> TokenFile:
    try:
        number, ends = read_index(index)
    except ValueError as error:
        raise StoreError(f"token file {path!r}: {error}") from None
    described = int(ends[-1]) * number.itemsize
    if described != size or not size:
        raise StoreError(
            f"token file {path!r}: {index.name} describes {int(ends[-1]):,} tokens of {number.name}, "
            f"{described:,} bytes; the file has {size:,}: one of them is cut, or they do not belong together"
        )
    return TokenFile(path, "megatron", np.memmap(path, number, mode="r"), is_gpt2=False, offsets=ends)


def _open_raw(path: str, size: int, head: bytes, dtype: str) -> TokenFile:
    if not size:
        raise StoreError(f"token file {path!r}: is empty")
    number = _number_type(path, dtype)
    if not dtype and (what := foreign(path, size, head)):
        raise StoreError(f"token file {path!r}: {what}; {_NAME_DTYPE}, if these are raw tokens")
    if size % number.itemsize:
        raise StoreError(
            f"token file {path!r}: {size:,} bytes are no whole number of {number.name}; it is cut, or {_NAME_DTYPE}"
        )
    return TokenFile(path, "nanogpt", np.memmap(path, number, mode="r"), is_gpt2=number == np.dtype(DEFAULT_DTYPE))


def _number_type(path: str, dtype: str) -> np.dtype:
    try:
        number = np.dtype(dtype or DEFAULT_DTYPE)
    except (TypeError, ValueError):
        number = None
    if number is None or number.kind not in "iu":
        raise StoreError(
            f"token file {path!r}: dtype = {dtype!r}: legal are uint8, uint16, int32, uint32, int64 and other whole "
            "numbers of NumPy, such as >u2 for uint16 in big-endian order"
        )
    return number


def check_samples(file: TokenFile, vocab_size: int) -> None:
    """Check the ids at the beginning, middle and end of a file, before anything is made of it."""
    for place, tokens in samples(file.tokens):
        file.check(tokens, vocab_size, place)


def document_ranges(file: TokenFile, ends: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[start, stop) of every document that is not empty, without `ends`, the tokens that stand between documents.

    The file's own boundaries where it has some (then `ends` are cut off at both ends of a document), else `ends`.
    """
    if file.offsets is not None:
        for start, stop in zip(file.offsets[:-1].tolist(), file.offsets[1:].tolist(), strict=True):
            while start < stop and int(file.tokens[start]) in ends:
                start += 1
            while start < stop and int(file.tokens[stop - 1]) in ends:
                stop -= 1
            if start < stop:
                yield start, stop
        return
    start, total, block = 0, len(file.tokens), 2**24
    for place in range(0, total, block):
        found = np.flatnonzero(np.isin(file.tokens[place : place + block], ends))
        for end in (place + found).tolist():
            if end > start:
                yield start, end
            start = end + 1
    if total > start:
        yield start, total
