"""What a source of documents is, and two of them: the Python standard library and nanoGPT token files."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Not documents of the library: its tests, other people's packages, and generated tables, which are near copies of
# one another and would let a model recite heldout files from training files.
STDLIB_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: a stable name, and its text or, where the source is tokenised already, its tokens."""

    key: str
    content: str | np.ndarray


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order."""

    def describe(self) -> dict[str, Any]:
        """What the manifest records: the same wherever the files lie."""
        ...

    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order."""
        ...


class SourceError(ValueError):
    """A source that cannot be read; the message names the file."""


@dataclasses.dataclass(frozen=True)
class PythonStdlib:
    """The `.py` files of the running Python's standard library, those of STDLIB_LEFT_OUT excepted."""

    def paths(self) -> list[tuple[str, pathlib.Path]]:
        """(name below the library folder, path), by name."""
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        kept = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
            paths = [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
            kept += [
                (path.relative_to(root).as_posix(), path)
                for path in paths
                if not path.name.startswith("_sysconfigdata")
            ]
        if not kept:
            raise SourceError(
                f"python-stdlib: no .py files in {root}; this Python keeps its library elsewhere, name a folder of text"
            )
        return sorted(kept)

    def describe(self) -> dict[str, Any]:
        """Python version and a digest of the files."""
        total = hashlib.sha256()
        for name, path in self.paths():
            total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return {"kind": "python-stdlib", "python": platform.python_version(), "sha256": total.hexdigest()}

    def documents(self) -> Iterator[Document]:
        """One document for each file."""
        for name, path in self.paths():
            yield Document(name, path.read_bytes().decode("utf-8", "replace"))
