"""Files that a stranger may have written: bounded JSON, paths that stay in their folder, atomic writes, digests.

Nothing here follows a link at the last part of a path; `inside` refuses those on the way to it as well.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NoReturn

MAX_JSON_BYTES = 16 * 2**20  # at worst "[]," in three bytes of text takes 64 bytes of memory
MAX_JSON_DEPTH = 32
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and newline


class FileError(ValueError):
    """A file that cannot be read or written safely; the message is one line that names it."""


def parse_json(
    content: bytes, name: str, *, kind: type = dict, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False
) -> Any:
    """The value of JSON text from anywhere.

    Args:
      content: UTF-8.
      name: of the file, for messages.
      kind: what the outermost value must be.
      max_bytes: of `content`.
      allow_nan: accept NaN and infinities, which JSON does not know and Python writes.

    Raises:
      FileError: damaged, larger than `max_bytes`, nested deeper than MAX_JSON_DEPTH, not of `kind`, or with control
        characters (tab and newline excepted) in a text, which terminals obey.
    """
    if len(content) > max_bytes:
        raise FileError(f"{name}: has {len(content):,} bytes; at most {max_bytes:,} are read")
    finite = {} if allow_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        text = content.decode("utf-8")
        value = json.loads(text, **finite)
    except RecursionError:
        raise FileError(f"{name}: is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise FileError(f"{name}: is no JSON ({one_line(error)}); restore it from a copy") from None
    if not isinstance(value, kind):
        raise FileError(f"{name}: holds {_kind_of(value)} where {_KINDS[kind]} is needed; restore it from a copy")
    _check_tree(value, name, controls="\\" in text or _CONTROLS.search(text) is not None)
    return value


def read_json(
    path: str | os.PathLike, *, kind: type = dict, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False
) -> Any:
    """The value of a JSON file; see parse_json. A file that is missing, a link or no file at all is a FileError."""
    return parse_json(
        read_bytes(path, max_bytes=max_bytes), str(path), kind=kind, max_bytes=max_bytes, allow_nan=allow_nan
    )


def read_bytes(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`; anything else is a FileError, a link included."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise FileError(f"{path}: has {size:,} bytes; at most {max_bytes:,} are read")
    return content


def entry(
    record: Mapping[str, Any], key: str, kind: type, name: str, *, least: float = -math.inf, most: float = math.inf
) -> Any:
    """record[key], which must be of `kind` and, a number, in [least, most]; else FileError. `name` is of the file."""
    if key not in record:
        raise FileError(f"{name}: has no {key!r}; restore it from a copy")
    value = record[key]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise FileError(f"{name}: {key} = {str(value)[:60]!r} where {_KINDS[kind]} is needed; restore it from a copy")
    if kind in (int, float) and not least <= value <= most:
        raise FileError(f"{name}: {key} = {str(value)[:60]} is outside [{least}, {most}]; restore it from a copy")
    return value


def inside(folder: str | os.PathLike, name: str | os.PathLike) -> pathlib.Path:
    """folder/name, where no part of `name` leaves the folder: neither absolute, nor `..`, nor a link to anywhere.

    The folder itself may be a link or lie below one. What `name` names need not exist.
    """
    folder, parts = pathlib.Path(folder), pathlib.PurePath(name).parts
    if not parts or pathlib.PurePath(name).is_absolute() or ".." in parts or "\0" in str(name):
        raise FileError(f"{str(name)!r}: leaves the folder {folder}; give a name below it")
    path = folder
    for part in parts:
        path = path / part
        refuse_link(path)
    return path


def refuse_link(path: str | os.PathLike) -> None:
    """Raises FileError when `path` is a symbolic link."""
    if os.path.islink(path):
        raise FileError(f"{path}: is a link to {os.readlink(path)!r}, and links are not followed here; remove it")


def open_regular(path: str | os.PathLike, flags: int) -> int:
    """A descriptor of the regular file at `path`, opened without following a link; FileError for anything else.

    A file that is opened for writing must have no other name either.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        refuse_link(path)
        if isinstance(error, FileNotFoundError):
            raise FileError(f"{path} does not exist; is this the --workdir of a run?") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise FileError(f"{path}: is no regular file; remove it") from None
        raise FileError(f"{path}: cannot be opened ({one_line(error)})") from None
    status = os.fstat(descriptor)
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    if stat.S_ISREG(status.st_mode) and (not writes or status.st_nlink <= 1):
        return descriptor
    os.close(descriptor)
    fault = "has a second name elsewhere" if stat.S_ISREG(status.st_mode) else "is no regular file"
    raise FileError(f"{path}: {fault}; remove it")


def check_folder_name(path: str | os.PathLike, name: str) -> None:
    """Raises FileError where `path`, which `name` names, is an address, or no name that tensorstore can take."""
    if "://" in str(path):
        raise FileError(f"{name} = {str(path)!r}: is an address, and a folder is needed; mount it, or copy it later")
    try:
        str(pathlib.Path(path).resolve()).encode()
    except UnicodeEncodeError:
        raise FileError(f"{name} = {str(path)!r}: its path is no UTF-8; name a folder whose path is") from None


def check_place(path: str | os.PathLike, name: str) -> None:
    """Raises FileError where new_file could not write `path`, which `name` names: known before the work is done."""
    path = pathlib.Path(path).absolute()
    refuse_link(path)
    folder = next(parent for parent in path.parents if parent.exists())
    faults = {
        f"{path} is a folder; name a file": path.is_dir(),
        f"{folder} is no folder; name another place": not folder.is_dir(),
        f"{folder} cannot be written; name another place": not os.access(folder, os.W_OK | os.X_OK),
    }
    fault = next((fault for fault, found in faults.items() if found), None)
    if fault:
        raise FileError(f"{name}: {fault}")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path beside `path` to write a new file to; in the end it goes to the disk, and into place by one rename.

    So `path` holds the old or the new bytes, whatever happens in between. Missing folders are made. A link at `path` is
    refused.
    """
    path = pathlib.Path(path)
    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        _sync(path.parent)


def write_bytes_atomic(path: str | os.PathLike, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Writes `content`, or what it writes, to a new file that replaces `path`; see new_file."""
    with new_file(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8; see write_bytes_atomic."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: str | os.PathLike, value: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Writes `value` as JSON without NaN; see write_bytes_atomic."""
    write_text_atomic(path, json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n")


def sha256(content: bytes) -> str:
    """Hexadecimal sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hexadecimal sha256 of `value` as JSON with sorted keys."""
    return sha256(json.dumps(value, sort_keys=True).encode())


def printable(text: str) -> str:
    """`text` with the characters that a terminal obeys (all controls but tab and newline) written as escapes."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """Type and beginning of the message of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_tree(value: Any, name: str, *, controls: bool) -> None:
    """Raises FileError for a value nested too deeply and, where there may be `controls`, for those in texts."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH + 1:
            raise FileError(f"{name}: is nested deeper than {MAX_JSON_DEPTH} levels")
        if controls:
            texts = (t for node in level for t in ([*node] if isinstance(node, dict) else [node]) if isinstance(t, str))
            bad = next((text for text in texts if _CONTROLS.search(text)), None)
            if bad is not None:
                raise FileError(f"{name}: holds a control character in {bad[:60]!r}; restore it from a copy")
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        kinds = (dict, list, str) if controls else (dict, list)
        level = [item for node in nodes for item in node if isinstance(item, kinds)]


def _kind_of(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
