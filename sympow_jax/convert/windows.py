"""Which layers of a foreign model see a window only."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sympow_jax.config import ConfigError
from sympow_jax.config.architecture import MAX_LAYERS
from sympow_jax.convert.parts import NotExactError, typed

_TYPES = {"full_attention": "attention", "sliding_attention": "window"}


def layer_kinds(ours: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of each layer: the layer pattern, repeated."""
    pattern = ours["attention.layer_pattern"]
    return tuple(pattern[layer % len(pattern)] for layer in range(ours["model.num_layers"]))


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest layer pattern that gives these kinds."""
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds)


@dataclasses.dataclass(frozen=True)
class AllWindows:
    """sliding_window, a number of tokens, of all layers; null for none.

    Attributes:
      default: what an absent key means.
    """

    default: int | None = None
    names = ("sliding_window",)

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        window = theirs.get("sliding_window", self.default)
        if window is None:
            return {"attention.layer_pattern": ("attention",)}
        return {"attention.layer_pattern": ("window",), "attention.window": typed("sliding_window", window, int)}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        kinds = {*layer_kinds(ours)}
        if kinds not in ({"attention"}, {"window"}):
            raise NotExactError(f"attention.layer_pattern = {ours['attention.layer_pattern']}")
        return {"sliding_window": ours["attention.window"] if kinds == {"window"} else None}


def last_layers(theirs: Mapping[str, Any], num_layers: int) -> list[str]:
    """Qwen: windows from layer max_window_layers on."""
    first = theirs.get("max_window_layers")
    first = 28 if first is None else typed("max_window_layers", first, int)
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]


def all_but_every(number: int) -> Callable[[Mapping[str, Any], int], list[str]]:
    """Gemma 2 and 3: windows in each layer whose number, from 1, is not divided by sliding_window_pattern."""

    def kinds(theirs: Mapping[str, Any], num_layers: int) -> list[str]:
        every = theirs.get("sliding_window_pattern") or theirs.get("_sliding_window_pattern") or number
        every = max(1, typed("sliding_window_pattern", every, int))
        return ["sliding_attention" if layer % every else "full_attention" for layer in range(1, num_layers + 1)]

    return kinds


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """sliding_window with layer_types, a word for each layer.

    Attributes:
      default: the words where there are none, of the configuration and the number of layers.
      switch: key that must be true for there to be windows; "" where there is none.
      window: what an absent sliding_window means.
    """

    default: Callable[[Mapping[str, Any], int], list[str]]
    switch: str = ""
    window: int = 4096

    @property
    def names(self) -> tuple[str, ...]:
        """See Part."""
        own = (
            "sliding_window",
            "layer_types",
            "max_window_layers",
            "sliding_window_pattern",
            "_sliding_window_pattern",
        )
        return (*own, self.switch) if self.switch else own

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        count = typed("num_hidden_layers", theirs.get("num_hidden_layers"), int)
        if not 1 <= count <= MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers = {count}: must be 1..{MAX_LAYERS}")
        types = theirs.get("layer_types")
        off = bool(self.switch) and not theirs.get(self.switch)
        if types is None:
            types = ["full_attention"] * count if off else self.default(theirs, count)
        if not isinstance(types, list) or len(types) != count or not all(kind in [*_TYPES] for kind in types):
            legal = ", ".join(_TYPES)
            raise ConfigError(f"layer_types = {str(types)[:60]!r}: expected {count} of {legal}")
        kinds = [_TYPES[kind] for kind in types]
        ours: dict[str, Any] = {"attention.layer_pattern": shortest_pattern(kinds)}
        if "window" in kinds:
            window = theirs.get("sliding_window", self.window)
            if off or window is None:
                raise ConfigError("layer_types: has sliding_attention, and sliding_window is off")
            ours["attention.window"] = typed("sliding_window", window, int)
        return ours

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        names = {kind: name for name, kind in _TYPES.items()}
        kinds = layer_kinds(ours)
        if not all(kind in names for kind in kinds):
            raise NotExactError(f"attention.layer_pattern = {ours['attention.layer_pattern']}")
        some = "window" in kinds
        theirs: dict[str, Any] = {"layer_types": [names[kind] for kind in kinds]}
        theirs["sliding_window"] = ours["attention.window"] if some else None
        return theirs | ({self.switch: some} if self.switch else {})
