"""tensorflow-datasets as documents: read at random through ArrayRecord data sources, without TensorFlow."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sympow_jax.input_pipeline.address import split_address
from sympow_jax.input_pipeline.metadata import StoreError
from sympow_jax.input_pipeline.packing import pack
from sympow_jax.input_pipeline.prepare.sources import Document, SourceError
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tokenizers import Tokenizer, load_tokenizer

PREFIX = "tfds:"
_OPTIONS = {"split": "train", "field": "", "tokenizer": "byte", "data_dir": ""}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """`tfds:NAME?split=train&field=text&tokenizer=byte&data_dir=DIR`: one split of a prepared ArrayRecord dataset.

    NAME is a dataset, `dataset/config:version`, or the folder of a prepared one. `field` may be left out where only
    one feature is text or tokens. The dataset is never downloaded here.
    """

    address: str

    @functools.cached_property
    def _parts(self) -> tuple[str, dict[str, str]]:
        name, options = split_address(self.address, _OPTIONS)
        name = name.removeprefix(PREFIX)
        if not name:
            raise SourceError(f"data = {self.address!r}: no dataset is named; write tfds:NAME")
        return name, options

    @functools.cached_property
    def _builder(self) -> Any:
        os.environ.setdefault("TFDS_DISABLE_TELEMETRY", "1")
        import tensorflow_datasets as tfds

        name, options = self._parts
        try:
            if pathlib.Path(name).is_dir():
                return tfds.builder_from_directory(name)
            return tfds.builder(name, data_dir=options["data_dir"] or None)
        except Exception as error:  # unknown names, unreadable folders and import errors of single datasets
            why = " ".join(str(error).split())[:200]
            raise SourceError(f"data = {self.address!r}: cannot be opened ({why})") from None

    @functools.cached_property
    def examples(self) -> Sequence[Any]:
        """The examples of the split, by number."""
        split = self._parts[1]["split"]
        builder = self._builder
        if not builder.info.splits:
            raise SourceError(
                f"data = {self.address!r}: not prepared in {builder.data_path}; run tensorflow-datasets' "
                "`tfds build --file_format=array_record` on it first"
            )
        try:
            return builder.as_data_source(split=split)
        except Exception as error:
            raise SourceError(
                f"data = {self.address!r}: split {split!r} cannot be read at random; splits are "
                f"{', '.join(builder.info.splits)}, in array_record format ({' '.join(str(error).split())[:200]})"
            ) from None

    @functools.cached_property
    def field(self) -> str:
        """The feature that holds text or tokens."""
        features = {name: str(feature.np_dtype) for name, feature in self._builder.info.features.items()}
        chosen = self._parts[1]["field"]
        texts = [name for name, dtype in features.items() if "object" in dtype or "str" in dtype]
        if not chosen and len(texts or features) == 1:
            chosen = next(iter(texts or features))
        if chosen not in features:
            raise SourceError(
                f"data = {self.address!r}: no field {chosen!r}; add ?field= with one of {', '.join(features)}"
            )
        return chosen

    @property
    def tokenizer(self) -> str:
        """The tokenizer named in the address."""
        return self._parts[1]["tokenizer"]

    def content(self, index: int) -> str | np.ndarray:
        """Text or tokens of one example. Raises SourceError for bytes that are no UTF-8, and for numbers not whole."""
        value = self.examples[index][self.field]
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"data = {self.address!r}: example {index} is no text: byte 0x{value[error.start]:02x} at offset "
                    f"{error.start} of {self.field!r} is no UTF-8 ({error.reason}); repair or name another field"
                ) from None
        tokens = np.asarray(value).reshape(-1)
        if tokens.dtype.kind not in "iu":
            raise SourceError(
                f"data = {self.address!r}: field {self.field!r} holds {tokens.dtype}, but text or whole numbers "
                "(tokens) are needed; name another with ?field="
            )
        return tokens

    def describe(self) -> dict[str, Any]:
        """Name, version, split, field and the number of examples and bytes."""
        info = self._builder.info
        split = self._parts[1]["split"]
        size = {name: [part.num_examples, part.num_bytes] for name, part in info.splits.items()}
        return {"kind": "tfds", "name": info.full_name, "split": split, "field": self.field, "splits": size}

    def documents(self) -> Iterator[Document]:
        """Every example, by number."""
        for index in range(len(self.examples)):
            yield Document(str(index), self.content(index))


class TfdsStore(Store):
    """A dataset as rows: example i, tokenised when it is read, cut after `seq_len` tokens, shorter ones padded.

    Padding has segment 0 and loss_mask 0. To train on all of long examples, and to waste nothing on short ones,
    make a store with data/prepare.py tfds:NAME.
    """

    segmented = True

    def __init__(self, address: str, *, seq_len: int) -> None:
        self._source = TfdsSource(address)
        self.address = address
        self.field = self._source.field
        self._tokenizer = load_tokenizer(self._source.tokenizer)
        self.vocab_size = self._tokenizer.vocab_size
        self.bos_id = self._tokenizer.bos_id
        self.num_documents = len(self._source.examples)
        self.document_length = seq_len
        self.chunks = (1024, seq_len)  # examples that a shuffled order keeps together
        self.clusters = np.arange(self.num_documents)

    @property
    def tokenizer(self) -> Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tokenizer named in the address."""
        return self._tokenizer

    @functools.cached_property
    def digest(self) -> str:
        """Over what the dataset says of itself."""
        return f"tfds:{hashlib.sha256(repr(self._source.describe()).encode()).hexdigest()}"

    def examples(self, rows: slice, columns: slice) -> dict[str, np.ndarray]:
        """inputs, targets, segment_ids, positions [rows, T] int32 and loss_mask [rows, T] float32; see packing.pack."""
        packed = []
        for row in range(rows.start, rows.stop):
            tokens = self._tokens(row)
            padded = np.zeros(self.document_length, np.int64)
            padded[: len(tokens)] = tokens
            packed.append(pack(padded, np.array([0, len(tokens)]), 0, bos_id=self.bos_id))
        return {name: np.stack([row[name] for row in packed]) for name in packed[0]}

    def _tokens(self, row: int) -> np.ndarray:
        content = self._source.content(row)
        tokens = self._tokenizer.encode(content) if isinstance(content, str) else content
        tokens = tokens[: self.document_length]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise StoreError(
                f"data = {self.address!r}: example {row} holds token {int(tokens.max())}, but vocab_size = "
                f"{self.vocab_size}; name the tokenizer that made the tokens"
            )
        return tokens

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        return self.examples(rows, columns)["targets"][:, columns].astype(np.uint32)
