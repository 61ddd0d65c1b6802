"""Files of tokens as documents."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sympow_jax.files import sha256
from sympow_jax.input_pipeline.prepare.sources import Document
from sympow_jax.input_pipeline.token_files import (
    TokenFile,
    check_samples,
    document_ranges,
    open_token_file,
)
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer

GPT2_END_OF_TEXT = 50256


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Files of tokens (see token_files), cut into documents.

    dtype: the number type of raw files. ends: the tokens that stand between documents, which are not part of them.
    vocab_size: what every id must be below.
    """

    paths: tuple[str, ...]
    dtype: str = ""
    ends: tuple[int, ...] = (GPT2_END_OF_TEXT,)
    vocab_size: int = GPT2_END_OF_TEXT + 1

    @functools.cached_property
    def files(self) -> tuple[TokenFile, ...]:
        """The opened files."""
        return tuple(open_token_file(path, dtype=self.dtype) for path in self.paths)

    def default_tokenizer(self) -> Tokenizer:
        """The one beside the first file, or GPT-2's where the format means it."""
        return self.files[0].tokenizer() or load_tokenizer("gpt2")

    def cut_for(self, tokenizer: Tokenizer) -> "TokenFiles":
        """The same, cut at BOS and EOS of `tokenizer`; StoreError where ids are beyond its vocabulary."""
        for file in self.files:
            check_samples(file, tokenizer.vocab_size)
        ends = {tokenizer.bos_id, *tokenizer.eos_ids[:1]}  # others end a turn of a chat, not a document
        return dataclasses.replace(self, ends=tuple(sorted(ends)), vocab_size=tokenizer.vocab_size)

    def describe(self) -> dict[str, Any]:
        """Digest of the files, and what else decides how they are read."""
        digests = [file.digest for file in self.files]
        described: dict[str, Any] = {"kind": "nanogpt"}
        if len(digests) == 1:
            described["sha256"] = digests[0]
        else:
            described |= {"files": len(digests), "sha256": sha256("\n".join(digests).encode())}
        offsets = [file.offsets.tobytes() for file in self.files if file.offsets is not None]
        if offsets:
            described["documents_sha256"] = sha256(b"".join(offsets))
        if self.ends != (GPT2_END_OF_TEXT,):
            described["ends"] = list(self.ends)
        return described

    def documents(self) -> Iterator[Document]:
        """The documents, named by where they start and, with several files, by their file."""
        for file in self.files:
            prefix = f"{file.digest}:" if len(self.files) > 1 else ""
            for start, stop in document_ranges(file, self.ends):
                tokens = np.array(file.tokens[start:stop])
                file.check(tokens, self.vocab_size, start)
                yield Document(f"{prefix}{start}", tokens)
