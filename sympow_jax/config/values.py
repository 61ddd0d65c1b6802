"""Between nested mappings, dotted keys, text and the dataclasses of a configuration."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from sympow_jax.config.errors import ConfigError, require, require_known


def build(cls: type, values: Any, path: str = "") -> Any:
    """A dataclass from nested mappings; every key must exist, every type must fit."""
    require(isinstance(values, Mapping), f"{path.rstrip('.') or 'config'} = {str(values)[:80]!r}: expected a mapping")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        require_known(f"{path}{key}: no such key", key, list(fields))
    missing = [name for name in fields if name not in values]
    require(not missing, f"{path}{missing[0] if missing else ''}: missing; configs/default.py lists every key")
    return cls(**{name: _convert(values[name], kind, path + name) for name, kind in fields.items()})


def _convert(value: Any, kind: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, path + ".")
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_convert(item, get_args(kind)[0], path) for item in items)
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"{path} = {value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.num_layers': 4, ...} of a Config, or of nested mappings."""
    if dataclasses.is_dataclass(tree):
        tree = dataclasses.asdict(tree)  # pyright: ignore[reportArgumentType]
    if not isinstance(tree, Mapping):
        return {prefix: tuple(tree) if isinstance(tree, list) else tree}
    return {k: v for key in tree for k, v in flatten(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of every field that differs."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def check_numbers(path: str, values: Sequence[float], *, least: float, most: float = math.inf, hint: str = "") -> None:
    """Raises ConfigError unless there are values, each of them once and from `least` to `most`."""
    legal = (f"at least {least:,}" if most == math.inf else f"from {least:,} to {most:,}") + hint
    require(bool(values), f"{path} = (): empty; give one or more numbers, {legal}")
    for value in values:
        require(least <= value <= most, f"{path} = {value}: must be {legal}")
        require(values.count(value) == 1, f"{path} = {','.join(map(str, values))}: {value} is there twice")


def parse_value(text: str, like: Any, path: str) -> Any:
    """A command-line string as the type of `like`."""
    if isinstance(like, tuple):
        items = (item.strip(" '\"") for item in text.strip("()").split(","))
        return tuple(parse_value(item, like[0], path) for item in items if item)
    if isinstance(like, bool):
        legal = {"true": True, "false": False, "1": True, "0": False}
        require(text.lower() in legal, f"{path} = {text!r}: expected true or false")
        return legal[text.lower()]
    try:
        value = type(like)(text.strip(" '\""))
    except ValueError:
        raise ConfigError(f"{path} = {text!r}: expected {type(like).__name__}") from None
    require(not isinstance(value, int) or -(2**63) <= value < 2**63, f"{path} = {text}: is beyond 64 bits")
    return value
