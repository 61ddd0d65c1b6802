"""Addresses with options, NAME?option=value&option=value."""

import urllib.parse
from collections.abc import Mapping


class AddressError(ValueError):
    """An address that is not understood; the message says which options there are."""


def split_address(address: str, defaults: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The name and its options, those of `defaults` where none are given. A % and two digits stand for a byte."""
    name, _, query = address.partition("?")
    options: dict[str, str] = {}
    for option in query.split("&") if query else []:  # not by parse_qs, to which the + of train+test is a space
        key, _, value = option.partition("=")
        if key not in defaults or key in options or not value:
            raise AddressError(
                f"data = {address!r}: option {option!r} is unknown, without a value or given twice; "
                f"options are {', '.join(f'{known}=...' for known in defaults)}"
            )
        options[key] = urllib.parse.unquote(value)
    return name, {**defaults, **options}
