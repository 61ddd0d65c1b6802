"""Documents of JSON: lines, one object, or a list of objects, the text in one field of each."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from sympow_jax.input_pipeline.prepare.decompress import DamagedError


class FieldError(DamagedError):
    """A record without the text field."""


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


def has_records(text: str, field: str) -> bool:
    """Whether the text of a `.json` is meant to hold records with `field`.

    Settings of programs, with comments or without, are no records; a damaged file that has the field somewhere counts.
    """
    try:
        return next(json_records(iter([text]), field), None) is not None
    except FieldError:
        return False
    except DamagedError:
        return json.dumps(field) in text


def field_text(record: Any, field: str, where: str) -> str:
    """The text in `field` of one record. Raises FieldError if there is none, DamagedError if it is no Unicode."""
    if not isinstance(record, dict):
        raise FieldError(f"{where} is no object with a text field {field!r}, but {type(record).__name__}")
    if field not in record:
        raise FieldError(f"{where} has no text field {field!r}, only {sorted(record)[:20]}; set --field")
    if not isinstance(record[field], str):
        raise FieldError(f"{where}: {field!r} is {json.dumps(record[field])[:40]}, which is no text; set --field")
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
