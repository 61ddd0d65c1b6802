"""Text files as documents, whatever compression, encoding or table they come in."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

from sympow_jax.files import file_sha256
from sympow_jax.input_pipeline.prepare.decompress import open_blocks
from sympow_jax.input_pipeline.prepare.file_formats import decode
from sympow_jax.input_pipeline.prepare.find_files import Found, TextFile, find_files, read_head, reading, report
from sympow_jax.input_pipeline.prepare.records import json_lines, json_records
from sympow_jax.input_pipeline.prepare.sources import Document
from sympow_jax.input_pipeline.prepare.tables import table_rows

_log = logging.getLogger(__name__)
_READER = 2  # in the manifest: what the first reader made, to which every byte was text, is not taken for this one's


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Files, folders (all files below) and globs.

    A file is a document; in JSON, parquet and Arrow files each record is, its text in `field`. Text is UTF-8, or
    UTF-16 and UTF-32 with a byte order mark, and gzip, bzip2, xz, zstd or lz4 is unpacked. Anything else is refused
    (SourceError) if it was named, left out with a warning if a folder or glob found it.
    """

    inputs: tuple[str, ...]
    field: str = "text"

    @functools.cached_property
    def found(self) -> Found:
        """What the inputs name, looked up once: documents must not change while they are read."""
        found = find_files(self.inputs, self.field)
        for line in report(found.left_out):
            _log.warning("text source: %s", line)
        return found

    def describe(self) -> dict[str, Any]:
        """File names and a digest of their content."""
        total = hashlib.sha256()
        for file in self.found.files:
            with reading(file.path):
                digest = bytes.fromhex(file_sha256(file.path))
            total.update(file.name.encode("utf-8", "surrogateescape") + b"\0" + digest)
        described = {"kind": "text", "reader": _READER, "files": len(self.found.files), "field": self.field}
        return described | {"sha256": total.hexdigest()}

    def documents(self) -> Iterator[Document]:
        """Every document, by file name and within a file in its order. Raises SourceError naming file and place."""
        for file in self.found.files:
            with reading(file.path):
                if file.kind == "text":
                    yield Document(file.name, "".join(_text(file)))
                else:
                    for number, content in self._records(file):
                        yield Document(f"{file.name}:{number}", content)

    def _records(self, file: TextFile) -> Iterator[tuple[int, str]]:
        if file.kind == "json_lines":
            return json_lines(_text(file), self.field)
        if file.kind == "json":
            return json_records(_text(file), self.field)
        return table_rows(file.path, file.kind, self.field)


def _text(file: TextFile) -> Iterator[str]:
    head, blocks = read_head(open_blocks(file.path))
    return decode(blocks, head)
