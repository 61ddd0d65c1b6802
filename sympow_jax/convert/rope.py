"""Rotary settings of foreign configurations: rope_theta with rope_scaling, and rope_parameters, which replaced both."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sympow_jax.config import ConfigError
from sympow_jax.convert.parts import NotExactError, typed

_ORIGINAL, _FRACTION = "original_max_position_embeddings", "partial_rotary_factor"
_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic_ntk", "yarn": "yarn", "llama3": "llama3"}
_WITH_ORIGINAL = ("dynamic", "yarn", "llama3")
_CONSTANTS = {  # of a kind, (type, what an absent one means); they are called position.* here
    "yarn": {
        "beta_fast": (float, 32.0), "beta_slow": (float, 1.0), "truncate": (bool, True),
        "attention_factor": (float, 0.0), "mscale": (float, 1.0), "mscale_all_dim": (float, 0.0),
    },
    "llama3": {"low_freq_factor": (float, 1.0), "high_freq_factor": (float, 4.0)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """The base of the rotary frequencies, their scaling, and the share of a head that they rotate.

    Attributes:
      base: what an absent rope_theta means.
      window_base: likewise of layers with a window, where they have their own and are never scaled; 0 where they have
        not.
      fraction: what an absent share means; 0 where there is no key for it.
      own: what the keys for the base and the share are called outside of rope_parameters.
    """

    base: float = 10_000.0
    window_base: float = 0.0
    fraction: float = 0.0
    own: tuple[str, str] = ("rope_theta", _FRACTION)

    @property
    def names(self) -> tuple[str, ...]:
        """See Part."""
        names = (self.own[0], "rope_theta", "rope_scaling", "rope_parameters")
        names += (self.own[1], _FRACTION) if self.fraction else ()
        return (*names, "rope_local_base_freq") if self.window_base else names

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        settings: dict[str, Any] = {"rope_theta": theirs.get(self.own[0]) or theirs.get("rope_theta") or self.base}
        ours = {}
        for name in ("rope_scaling", "rope_parameters"):
            found = typed(name, theirs.get(name) or {}, dict)
            if self.window_base and "full_attention" in found:
                window = typed("sliding_attention", found.get("sliding_attention"), dict)
                ours |= self._window(window.get("rope_theta"), window)
                found = typed("full_attention", found["full_attention"], dict)
            settings |= found
        if self.window_base:
            ours = self._window(theirs.get("rope_local_base_freq"), {}) | ours
        ours["position.rotary_fraction"] = self._share(theirs, settings.pop(_FRACTION, None))
        return ours | _scaling(settings, theirs)

    def _share(self, theirs: Mapping[str, Any], in_settings: Any) -> float:
        """The share of a head, which a file may have under several names."""
        found = {"rope_parameters": in_settings} | {name: theirs.get(name) for name in (self.own[1], _FRACTION)}
        (name, share), *others = [pair for pair in found.items() if pair[1]] or [(_FRACTION, self.fraction or 1.0)]
        for other, value in others:
            if value != share:
                raise ConfigError(f"{other} = {value}: {name} says {share} for the same; take out the wrong one")
        if not self.fraction and share != 1:
            raise ConfigError(f"{_FRACTION} = {share}: is not understood in this family")
        return typed(_FRACTION, share, float)

    def _window(self, base: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The base of layers with a window."""
        if settings.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_type = {settings['rope_type']!r}: layers with a window cannot be scaled here")
        return {"position.window_base": typed("rope_theta", base or self.window_base, float)}

    def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """See Part."""
        kind = next((theirs for theirs, scaling in _KINDS.items() if scaling == ours["position.scaling"]), None)
        if kind is None:
            raise NotExactError(f"position.scaling = {ours['position.scaling']!r}")
        theirs: dict[str, Any] = {self.own[0]: ours["position.base"], "rope_scaling": None}
        theirs |= {self.own[1]: ours["position.rotary_fraction"]} if self.fraction else {}
        theirs |= {"rope_local_base_freq": ours["position.window_base"]} if self.window_base else {}
        if kind == "default":
            return theirs
        scaling = {"rope_type": kind, "factor": ours["position.factor"]}
        if kind == "dynamic":
            theirs["max_position_embeddings"] = ours["position.original_length"]  # what it scales from
        elif kind in _WITH_ORIGINAL:
            scaling[_ORIGINAL] = ours["position.original_length"]
        for name, (_, absent) in _CONSTANTS.get(kind, {}).items():
            value = ours[f"position.{name}"]
            scaling |= {name: value} if value != absent or kind == "llama3" else {}
        return theirs | {"rope_scaling": scaling}


def _scaling(settings: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of settings in which every key must be understood."""
    kind = settings.pop("rope_type", None) or settings.get("type") or "default"
    settings.pop("type", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"rope_type = {str(kind)[:60]!r}: is not understood; legal are {', '.join(_KINDS)}")
    ours = {"position.scaling": _KINDS[kind], "position.base": typed("rope_theta", settings.pop("rope_theta"), float)}
    length = theirs.get("max_position_embeddings")
    original = settings.pop(_ORIGINAL, None) or theirs.get(_ORIGINAL) or length
    if kind in _WITH_ORIGINAL:
        ours["position.original_length"] = typed(_ORIGINAL, original, int)
    if kind != "default":
        factor = settings.pop("factor", None)
        ours["position.factor"] = typed("factor", factor, float)
    constants = _CONSTANTS.get(kind, {})
    if not (settings.get("mscale") and settings.get("mscale_all_dim")):  # one alone has no effect
        settings = {name: value for name, value in settings.items() if name not in ("mscale", "mscale_all_dim")}
    for name, value in settings.items():
        if value is None:
            continue
        if name not in constants:
            raise ConfigError(f"{name} = {str(value)[:60]!r}: this setting of rope_type {kind!r} is not understood")
        ours[f"position.{name}"] = typed(name, value, constants[name][0])
    return ours
