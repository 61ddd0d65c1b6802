"""What the JSON of an evaluation holds, checked before it is drawn: a workdir may come from anyone."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from sympow_jax.files import FileError, read_json

_LABEL = re.compile(r"[\w .,()=+-]{1,100}")  # what figures draw as it stands: no markup, no formulas
_COUNT, _NUMBER, _VALUE = "a whole number from 0", "a number or null", "a name, number or null"
_TEXT, _NAME = "text", "a name"
_CI95 = (_NUMBER, _NUMBER)
_ROW = {"nll": _NUMBER, "ci95": _CI95}
LENGTH_GENERALISATION: dict[str, Any] = {
    "train_length": _COUNT,
    "num_documents": _COUNT,
    "num_sources": _COUNT,
    "lengths": [_ROW | {"length": _COUNT}],
    "same_target": [_ROW | {"context": _COUNT}],
    "same_target_change": {"context": [_COUNT], "from_context": _COUNT, "difference": [_NUMBER], "ci95": [_CI95]},
    "contextwise": {"position": [_NUMBER], "nll": [_NUMBER], "ci95": [_CI95]},
    "data": {"store": _TEXT, "digest": _TEXT, "bos_rule": _TEXT},
}
_GAINED = {"from_context": _COUNT, "to_context": _COUNT, "gain": _NUMBER, "ci95": _CI95}
_REMEMBERED = {"share": _NUMBER, "ci95": _CI95}
_AXIS = {"name": _NAME, "values": [_VALUE]}
OF_A_RUN = LENGTH_GENERALISATION | {"variant": _NAME, "seed": _COUNT}
RETRIEVAL: dict[str, Any] = {
    "train_length": _COUNT,
    "task": _NAME,
    "num_examples": _COUNT,
    "rows": _AXIS,
    "columns": _AXIS,
    "accuracy": [[_NUMBER]],
}
BIASES: dict[str, Any] = {
    "query_position": _COUNT,
    "distance": [_COUNT],
    "layers": [{"layer": _COUNT, "log_weight": [[_NUMBER]]}],
}
REMEMBRANCE: dict[str, Any] = {
    "train_length": _COUNT,
    "num_documents": _COUNT,
    "num_sources": _COUNT,
    "num_targets": _COUNT,
    "length": _COUNT,
    "loss": _ROW,
    "remembrance": {
        "position": [_COUNT],
        "difference": [_NUMBER],
        "ci95": [_CI95],
        "total_variation": [_NUMBER],
        "total_variation_ci95": [_CI95],
    },
}
_NORMS = {"layer": _COUNT, "state": [_NUMBER], "normalizer": [_NUMBER]}
_SHAPES = {
    "same_target": LENGTH_GENERALISATION,
    "remembrance": REMEMBRANCE,
    "accuracy": RETRIEVAL,
    "query_position": BIASES,
}


def read_result(path: str | os.PathLike, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The result in a JSON file of a workdir's eval/, of the shape that plots and tables read; by default its own.

    Raises:
      FileError: see files.read_json, or a key that is missing or holds something else.
    """
    result = read_json(path)
    if shape is None:
        shape = next((shape for key, shape in _SHAPES.items() if key in result), {})
    _check(result, shape, str(path), "")
    if result.get("variant") is not None:
        _check(result["variant"], _NAME, str(path), "variant")
    if "same_target" in shape:
        _check_lengths(result, str(path))
    if "remembrance" in shape:
        _check_remembrance(result, str(path))
    if "accuracy" in shape:
        _check_table(result["accuracy"], result["columns"]["values"], str(path), ".accuracy")
        _require(len(result["accuracy"]) == len(result["rows"]["values"]), str(path), ".accuracy", "of as many rows")
    if "query_position" in shape:
        for layer in result["layers"]:
            _check_table(layer["log_weight"], result["distance"], str(path), ".layers[].log_weight")
    return result


def _check(value: Any, shape: Any, file: str, place: str) -> None:
    if isinstance(shape, dict):
        _require(isinstance(value, Mapping), file, place, "an object")
        for key, inner in shape.items():
            _require(key in value, file, f"{place}.{key}", "there")
            _check(value[key], inner, file, f"{place}.{key}")
    elif isinstance(shape, list):
        _require(isinstance(value, list) and len(value) > 0, file, place, "a list that is not empty")
        for item in value:
            _check(item, shape[0], file, f"{place}[]")
    elif isinstance(shape, tuple):
        _require(isinstance(value, list) and len(value) == len(shape), file, place, f"a list of {len(shape)}")
        for item in value:
            _check(item, shape[0], file, f"{place}[]")
    elif shape == _NUMBER or (shape == _VALUE and not isinstance(value, str)):
        _require(value is None or (_is_number(value) and abs(value) < 1e300), file, place, shape)
    elif shape == _COUNT:
        _require(type(value) is int and 0 <= value < 2**62, file, place, shape)
    else:
        legal = isinstance(value, str) and (shape == _TEXT or _LABEL.fullmatch(value) is not None)
        _require(legal, file, place, shape)


def _check_table(rows: list, columns: list, file: str, place: str) -> None:
    for row in rows:
        _require(len(row) == len(columns), file, place, f"of rows of {len(columns)} entries")


def _check_lengths(result: Mapping[str, Any], file: str) -> None:
    change, contexts = result["same_target_change"], len(result["same_target"])
    columns = {"difference": change["difference"], "ci95": change["ci95"], "context": change["context"]}
    for name, column in columns.items():
        _require(len(column) == contexts, file, f".same_target_change.{name}", f"of {contexts} entries")
    _require(change["from_context"] in change["context"], file, ".same_target_change.from_context", "a context")
    _require(min(result["train_length"], *change["context"]) > 0, file, ".train_length and contexts", "positive")
    _require(len(result["lengths"]) == contexts, file, ".lengths", f"of {contexts} entries")
    table = result["contextwise"]
    lengths = {len(table[name]) for name in ("position", "nll", "ci95")}
    _require(len(lengths) == 1, file, ".contextwise", "of columns of one length")
    if gains := result.get("gained_from_context"):  # files of earlier versions have none
        _check(gains, [_GAINED], file, ".gained_from_context")
    if remembered := result.get("remembered_share"):  # likewise
        _check(remembered, _REMEMBERED, file, ".remembered_share")
    _check_header(result, file)


def _check_remembrance(result: Mapping[str, Any], file: str) -> None:
    table = result["remembrance"]
    places, context = len(table["position"]), result["length"] - result["num_targets"]
    columns = {f".remembrance.{name}": column for name, column in table.items()}
    norms = result.get("state_norms")
    if norms != []:  # of a model without a finite state
        _check(norms, [_NORMS], file, ".state_norms")
    for number, entry in enumerate(norms or ()):
        columns |= {f".state_norms[{number}].{name}": entry[name] for name in ("state", "normalizer")}
    for place, column in columns.items():
        _require(len(column) == places, file, place, f"of {places} entries")
    legal = all(0 < position <= context for position in table["position"])
    _require(legal, file, ".remembrance.position", f"from 1 to length - num_targets = {context}")
    _require(result["train_length"] > 0, file, ".train_length", "positive")
    _check_header(result, file)


def _check_header(result: Mapping[str, Any], file: str) -> None:
    """What labels are made of, where it is there."""
    overrides = result.get("position_overrides") or {}
    _check(overrides, {}, file, ".position_overrides")
    for key, value in overrides.items():
        _check([key, str(value)], [_NAME], file, ".position_overrides")
    for name in ("seed", "step", "num_targets"):
        if result.get(name) is not None:
            _check(result[name], _COUNT, file, f".{name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, file: str, place: str, wanted: str) -> None:
    if not condition:
        raise FileError(f"{file}: {place.lstrip('.') or 'the file'} is not {wanted}; evaluate again")
