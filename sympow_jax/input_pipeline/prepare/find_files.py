"""Which files a text source reads, under which names, and what it leaves out."""

import contextlib
import dataclasses
import glob
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

from sympow_jax.input_pipeline.prepare.decompress import DamagedError, open_blocks
from sympow_jax.input_pipeline.prepare.file_formats import HEAD, ForeignError, decode, recognise
from sympow_jax.input_pipeline.prepare.records import has_records
from sympow_jax.input_pipeline.prepare.sources import SourceError
from sympow_jax.input_pipeline.prepare.tables import split_dataset_folder


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file to read: its name below the deepest folder that holds all files read, and its kind (see recognise)."""

    name: str
    path: pathlib.Path
    kind: str


@dataclasses.dataclass
class Found:
    """The files to read, by name, and what else was found: {why it is left out: [paths]}."""

    files: list[TextFile]
    left_out: dict[str, list[str]]


def find_files(inputs: Iterable[str], field: str) -> Found:
    """The text files that files, folders and globs name, each once however often it is named.

    A file that is named itself must be text. What a folder or glob finds is left out where it is hidden, no regular
    file, no text, or a `.json` without records that have `field` (settings of a program, say). Names depend on the set
    of files that are read alone: not on the order or the kind of the inputs, nor on where the files lie.
    """
    left_out: dict[str, list[str]] = {}
    named: dict[pathlib.Path, bool] = {}  # whether the file itself was named
    for given in inputs:
        for path, itself in _candidates(given, left_out):
            path = pathlib.Path(os.path.abspath(path))
            named[path] = named.get(path, False) or itself
    kinds: dict[pathlib.Path, str] = {}
    seen: set[str] = set()
    for path in sorted(named):
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        try:
            kinds[path] = kind_of(path, "" if named[path] else field)
        except ForeignError as error:
            if named[path]:
                raise SourceError(f"text source {str(path)!r}: is {error}{error.place}, but text is needed") from None
            left_out.setdefault(str(error), []).append(str(path))
    if not kinds:
        raise SourceError("text source: no file to read" + "".join(f"; {line}" for line in report(left_out)))
    common = pathlib.Path(os.path.commonpath([path.parent for path in kinds]))
    return Found([TextFile(p.relative_to(common).as_posix(), p, kind) for p, kind in kinds.items()], left_out)


def report(left_out: dict[str, list[str]], shown: int = 5) -> list[str]:
    """One line for each reason: how many files were left out, why, and the first of them."""
    lines = []
    for reason, paths in sorted(left_out.items()):
        names = ", ".join(map(repr, sorted(paths)[:shown])) + (", ..." if len(paths) > shown else "")
        lines.append(f"{len(paths)} left out, {reason}: {names}")
    return lines


def kind_of(path: pathlib.Path, field: str = "") -> str:
    """What `path` holds; see file_formats.recognise. With `field`, a `.json` without records of it is ForeignError."""
    with reading(path):
        head, blocks = read_head(open_blocks(path))
        kind = recognise(path, head)
        if kind == "json" and field and not has_records("".join(decode(blocks, head)), field):
            raise ForeignError(f"a .json without records that have a text field {field!r}")
    return kind


def read_head(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """At least HEAD bytes of the content, or all of it, and the blocks from the beginning."""
    head = b""
    while len(head) < HEAD and (block := next(blocks, b"")):
        head += block
    return head[:HEAD], itertools.chain([head] if head else [], blocks)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Makes what goes wrong with a file a SourceError that names it."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"text source {str(path)!r}: cannot be read ({error.strerror or error})") from None
    except DamagedError as error:
        raise SourceError(f"text source {str(path)!r}: {error}") from None


def _candidates(given: str, left_out: dict[str, list[str]]) -> Iterator[tuple[pathlib.Path, bool]]:
    """(path, whether it was named itself) of every regular file that one input names."""
    if not given:
        raise SourceError("text source '': is no name; '.' is the present folder")
    root = pathlib.Path(given)
    if root.is_dir():
        yield from ((path, False) for path in _walk(root, left_out))
    elif root.is_file():
        yield root, True
    elif os.path.lexists(root):
        raise SourceError(f"text source {given!r}: is a broken link or no regular file")
    elif matches := sorted(glob.glob(given, recursive=True)):
        for match in map(pathlib.Path, matches):
            if match.is_dir():
                yield from ((path, False) for path in _walk(match, left_out))
            elif match.is_file():
                yield match, False
            else:
                left_out.setdefault("no regular file", []).append(str(match))
    else:
        raise SourceError(f"text source {given!r}: no such file, folder or glob")


def _walk(root: pathlib.Path, left_out: dict[str, list[str]]) -> Iterator[pathlib.Path]:
    """The regular files below `root` that are not hidden; links to files are followed, links to folders are not."""

    def leave_out(reason: str, folder: str, names: list[str]) -> None:
        if names:
            left_out.setdefault(reason, []).extend(os.path.join(folder, name) for name in names)

    def refuse(error: OSError) -> None:
        raise SourceError(f"text source {error.filename!r}: cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=refuse):
        leave_out("hidden", folder, [name for name in (*folders, *names) if name.startswith(".")])
        names = [name for name in names if not name.startswith(".")]
        with reading(pathlib.Path(folder)):
            names, own = split_dataset_folder(pathlib.Path(folder), names)
        leave_out("bookkeeping and caches of a saved dataset", folder, own)
        leave_out("no regular file", folder, [name for name in names if not os.path.isfile(os.path.join(folder, name))])
        shown = [name for name in folders if not name.startswith(".")]
        leave_out("linked folders", folder, [name for name in shown if os.path.islink(os.path.join(folder, name))])
        folders[:] = [name for name in shown if not os.path.islink(os.path.join(folder, name))]
        yield from (path for name in names if (path := pathlib.Path(folder, name)).is_file())
