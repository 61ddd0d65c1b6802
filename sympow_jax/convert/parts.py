"""Keys of a foreign configuration and what they mean here: the rows of a family's table, read in both directions."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from sympow_jax.config import ConfigError

REQUIRED = object()


class NotExactError(ValueError):
    """A model, or a configuration, that a family cannot express exactly; the message says what."""


@runtime_checkable
class Part(Protocol):
    """Some keys of a foreign configuration and what they mean here, dotted keys of `Config`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The foreign keys."""
        ...

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our keys and values; ConfigError for a value that cannot be expressed."""
        ...

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Their keys and values; NotExactError where there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class Key:
    """One foreign key that is one of ours.

    Attributes:
      theirs, ours: the names.
      kind: type of the foreign value.
      default: what an absent or null key means to the other library, or a function of the whole configuration.
      choices: their value -> ours, where they are not equal.
      inverse: ours is 1 / theirs, to this power.
    """

    theirs: str
    ours: str
    kind: type
    default: Any = REQUIRED
    choices: Mapping[Any, Any] | None = None
    inverse: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """See Part."""
        return (self.theirs,)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        value = theirs.get(self.theirs)
        if value is None:
            if self.default is REQUIRED:
                raise ConfigError(f"{self.theirs}: missing")
            value = self.default(theirs) if callable(self.default) else self.default
        value = typed(self.theirs, value, self.kind)
        if self.inverse:
            if value <= 0:
                raise ConfigError(f"{self.theirs} = {value}: must be positive")
            return {self.ours: value**-self.inverse}
        if self.choices is None:
            return {self.ours: value}
        if value not in self.choices:
            raise ConfigError(f"{self.theirs} = {value!r}: is not understood; {_legal(self.choices)}")
        return {self.ours: self.choices[value]}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        value = ours[self.ours]
        if self.inverse:
            return {self.theirs: self._number(value ** (-1 / self.inverse))}
        if self.choices is None:
            return {self.theirs: value}
        found = next((name for name, meaning in self.choices.items() if meaning == value), None)
        if found is None:
            raise NotExactError(f"{self.ours} = {value!r}")
        return {self.theirs: found}

    def _number(self, value: float) -> float:
        """Without the rounding of an inverse, where that is seen."""
        near = round(value)
        if math.isclose(value, near, rel_tol=1e-12):
            return self.kind(near)
        if self.kind is int:
            raise NotExactError(f"{self.theirs} = {value}")
        return value


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A foreign key of which one value is understood; absent or null, it has that value."""

    theirs: str
    value: Any

    @property
    def names(self) -> tuple[str, ...]:
        """See Part."""
        return (self.theirs,)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        value = theirs.get(self.theirs)
        if value is not None and value != self.value:
            raise ConfigError(f"{self.theirs} = {value!r}: is not understood; {_legal([self.value])}")
        return {}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        return {self.theirs: self.value}


@dataclasses.dataclass(frozen=True)
class Derived:
    """A key of ours that follows from others of theirs."""

    ours: str
    function: Callable[[Mapping[str, Any]], Any]
    names = ()

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        return {self.ours: self.function(theirs)}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        return {}


@dataclasses.dataclass(frozen=True)
class Cap:
    """A cap of logits, null for none.

    Attributes:
      theirs: its key.
      ours: what it is here, "" where there is no such thing and only null is understood.
      default: what an absent key means.
    """

    theirs: str
    ours: str
    default: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """See Part."""
        return (self.theirs,)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        value = theirs.get(self.theirs, self.default)
        if not self.ours:
            if value is not None:
                raise ConfigError(f"{self.theirs} = {value}: attention has no such cap here; only null is understood")
            return {}
        return {self.ours: 0.0 if value is None else typed(self.theirs, value, float)}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        return {self.theirs: (ours[self.ours] or None) if self.ours else None}


def typed(name: str, value: Any, kind: type) -> Any:
    """`value`, a whole number as a float where that is wanted; ConfigError for another type."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} = {str(value)[:60]!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _legal(values: Iterable[Any]) -> str:
    return f"legal are {', '.join(map(repr, values))}"
