"""Documents of JSON: lines, one object, or a list of objects, the text in one field of each."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from sympow_jax.input_pipeline.prepare.decompress import DamagedError


def json_lines(text: Iterator[str], field: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line that is not blank. Raises DamagedError naming the line."""
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            where = f"line {number}"
            yield number, field_text(_parse(line, where), field, where)


def json_records(text: Iterator[str], field: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the objects of a `.json`: a list, a single object, or lines, as such files often hold.

    It holds lines if its first line is a whole object.
    """
    lines = _lines(text)
    first = next(lines, "")
    if _is_object(first):
        yield from json_lines((f"{line}\n" for line in itertools.chain([first], lines)), field)
        return
    value = _parse("\n".join([first, *lines]), "its content")
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield number, field_text(record, field, f"record {number}")


def field_text(record: Any, field: str, where: str) -> str:
    """The text in `field` of one record. Raises DamagedError if there is none, or it is no Unicode."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        names = sorted(record)[:20] if isinstance(record, dict) else type(record).__name__
        raise DamagedError(f"{where} has no text field {field!r}, only {names}; set --field")
    text = record[field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DamagedError(
            f"{where}: character {error.start} of {field!r} is half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}), which is no text; repair or remove the record"
        ) from None
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is no JSON ({error})") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: Iterator[str]) -> Iterator[str]:
    """Lines ended by a line feed, without it."""
    pending: list[str] = []
    for part in text:
        first, *rest = part.split("\n")
        pending.append(first)
        if rest:
            yield "".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if any(pending):
        yield "".join(pending)
