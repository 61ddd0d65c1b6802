"""Starting a run from the parameters of another: --init_from=WORKDIR[:STEP], weights only, layer by layer.

The other run may have had another context length, optimizer, layer pattern or variant: a parameter of layer n is taken
from layer n of the checkpoint when its name, shape and dtype are those of the new model. What is not in the checkpoint
starts anew only if --init_from_allow names it. What was and was not taken is printed and recorded in init_from.json,
from which a run killed before its first checkpoint starts again.
"""

import dataclasses
import fnmatch
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sympow_jax.config import Config, ConfigError
from sympow_jax.files import entry, read_json, write_json_atomic
from sympow_jax.models.model import Model
from sympow_jax.models.transformer import layer_runs
from sympow_jax.sharding.agreement import from_first
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import CheckpointError, fill, flatten, unflatten
from sympow_jax.training.run_files import load_config
from sympow_jax.typing import PyTree

RECORD = "init_from.json"
_RUN = re.compile(r"params/blocks_(\d+)/(.+)")  # the arrays of a run of equal layers, stacked along their first dim


class Place(NamedTuple):
    """Where a parameter is: the name of its array, and its index there where the array holds a run of layers."""

    array: str
    index: int | None


def layer_places(arrays: Iterable[str], config: Config) -> dict[str, Place]:
    """{"layers/3/mixer/query/kernel": Place, "embedding/embedding": Place} of the arrays below "params/"."""
    first = [0, *itertools.accumulate(depth for _, depth in layer_runs(config))]
    places = {}
    for array in arrays:
        if run := _RUN.fullmatch(array):
            begin, end = first[int(run[1])], first[int(run[1]) + 1]
            places |= {f"layers/{layer}/{run[2]}": Place(array, layer - begin) for layer in range(begin, end)}
        else:
            places[array.removeprefix("params/")] = Place(array, None)
    return places


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """What to take from where.

    Attributes:
      workdir: absolute path of the other run.
      step: of its checkpoint.
      digest: of that checkpoint (Checkpointer.digest).
      taken: names of the parameters taken, by layer.
      kept: those that stay as initialised, and why.
      unused: parameters of the checkpoint that the model has no use for.
      tokenizer: "same" or "another": whether token ids mean the same.
      allow: patterns of what may stay as initialised.
      config: of the new model.
    """

    workdir: str
    step: int
    digest: str
    taken: list[str]
    kept: dict[str, str]
    unused: list[str]
    tokenizer: str
    allow: str
    config: Config

    def apply(self, params: PyTree) -> PyTree:
        """`params` with the parameters taken, verified, with the shardings of `params`."""
        target = flatten({"params": params})
        wanted = layer_places(target, self.config)
        with Checkpointer(pathlib.Path(self.workdir) / "checkpoints", read_only=True) as checkpointer:
            specs = _params(checkpointer.describe(self.step)[0])
            have = layer_places(specs, load_config(self.workdir))
            like = dict(specs)
            for name in self.taken:
                sharding = target[wanted[name].array].sharding  # layers are not sharded over each other
                spec = specs[have[name].array]
                like[have[name].array] = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
            saved = flatten(checkpointer.restore(self.step, like=unflatten(like)).tree)
        for array, names in _by_array(self.taken, wanted).items():
            target[array] = _assemble(target[array], [(wanted[name], have[name]) for name in names], saved)
        return fill({"params": params}, target)["params"]

    def describe(self) -> str:
        """One line, and one for each parameter not taken."""
        total = len(self.taken) + len(self.kept)
        lines = [f"starts from {len(self.taken)} of {total} parameters of {self.workdir}, step {self.step}"]
        lines += [f"  {name} keeps its initial value: {reason}" for name, reason in self.kept.items()]
        lines += [f"  {name} of the checkpoint is not used" for name in self.unused]
        if self.tokenizer != "same":
            lines.append("  its tokeniser was another: its embedding and output rows stand for other tokens")
        return "\n".join(lines)

    def record(self, workdir: str) -> None:
        """Writes init_from.json."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        write_json_atomic(pathlib.Path(workdir) / RECORD, values)


def _by_array(names: Iterable[str], places: Mapping[str, Place]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(places[name].array, []).append(name)
    return groups


def _assemble(fresh: jax.Array, pairs: Sequence[tuple[Place, Place]], saved: Mapping[str, jax.Array]) -> jax.Array:
    """The array of `fresh` with what `pairs` (place here, place there) name in place of its own."""
    whole = saved[pairs[0][1].array]
    if pairs[0][0].index is None:
        return whole
    places = [(there.array, there.index) for _, there in pairs]
    if whole.shape == fresh.shape and places == [(pairs[0][1].array, i) for i in range(fresh.shape[0])]:
        return whole

    def assemble(fresh: jax.Array, parts: list[jax.Array]) -> jax.Array:
        layers = list(fresh)
        for (here, there), part in zip(pairs, parts, strict=True):
            layers[here.index or 0] = part[there.index or 0]
        return jnp.stack(layers)

    parts = [saved[there.array] for _, there in pairs]
    return jax.block_until_ready(jax.jit(assemble, out_shardings=fresh.sharding)(fresh, parts))


def check_source(source: str, workdir: str, *, has_checkpoints: bool) -> dict[str, Any] | None:
    """What init_from.json in a workdir records, if it is there.

    Raises:
      ConfigError: the run there started otherwise than `source` says.
    """
    path = pathlib.Path(workdir) / RECORD
    recorded = read_json(path) if path.exists() else None
    if recorded:
        for name, kind in (("workdir", str), ("step", int)):
            entry(recorded, name, kind, str(path))
    if source and (recorded or has_checkpoints):
        folder, step = _split(source)
        started = f"{recorded['workdir']}:{recorded['step']}" if recorded else "scratch"
        same = recorded and folder == recorded["workdir"] and step in ("latest", "best", str(recorded["step"]))
        if not same:
            raise ConfigError(f"--init_from={source}: the run in {workdir} started from {started}; use another workdir")
    return recorded


def plan_initial_weights(
    source: str, workdir: str, model: Model, tokenizer_digest: str, *, has_checkpoints: bool, allow: str = ""
) -> InitialWeights | None:
    """What a run in `workdir` starts from; reads manifests only. None: from scratch, or from its own checkpoints.

    Args:
      source: WORKDIR or WORKDIR:STEP, STEP being latest, best or a number; "" for what the workdir has recorded.
      workdir: of the new run.
      model: of the new run.
      tokenizer_digest: of the new run.
      has_checkpoints: the new run has begun already.
      allow: comma-separated patterns (fnmatch) of parameters, "layers/*/mixer/gate/*", that may start anew.

    Raises:
      ConfigError: the workdir's run started otherwise, or a parameter is not there and not allowed to start anew.
      CheckpointError: there is no such step.
    """
    recorded = check_source(source, workdir, has_checkpoints=has_checkpoints)
    folder, step = _split(source) if source else ("", "")
    if has_checkpoints or not (source or recorded):
        return None
    if recorded:
        folder, step, allow = recorded["workdir"], str(recorded["step"]), allow or recorded.get("allow", "*")
    return _plan(folder, step, model, tokenizer_digest, allow)


def _plan(folder: str, step: str, model: Model, tokenizer_digest: str, allow: str) -> InitialWeights:
    with Checkpointer(pathlib.Path(folder) / "checkpoints", read_only=True) as checkpointer:
        chosen = from_first("--init_from", lambda: _choose(checkpointer, folder, step), CheckpointError)
        specs, _ = checkpointer.describe(chosen)
        of_step = checkpointer.digest(chosen)
    saved = _params(specs)
    wanted = flatten({"params": jax.eval_shape(model.init, jax.random.key(0))})
    here, there = layer_places(wanted, model.config), layer_places(saved, load_config(folder))
    kept = {}
    for name, place in here.items():
        if reason := _misfit(_shape(wanted, place), _shape(saved, there[name]) if name in there else None):
            kept[name] = reason
    refused = {name: why for name, why in kept.items() if not _matches(name, allow)}
    if refused:
        name, reason = next(iter(refused.items()))
        raise ConfigError(
            f"--init_from={folder}:{chosen}: {len(refused)} of {len(here)} parameters of this model are not in it, the "
            f"first {name} ({reason}); use a config that fits, or name what may start anew, for example "
            f"--init_from_allow='{re.sub(r'^layers/[0-9]+', 'layers/*', name)}'"
        )
    digest = read_json(pathlib.Path(folder) / "data.json").get("tokenizer_digest")
    tokenizer = "same" if digest == tokenizer_digest else "another"
    taken, unused = [name for name in here if name not in kept], [name for name in there if name not in here]
    return InitialWeights(folder, chosen, of_step, taken, kept, unused, tokenizer, allow, model.config)


def _choose(checkpointer: Checkpointer, folder: str, step: str) -> int:
    steps = checkpointer.steps()
    chosen = {"latest": max(steps, default=None), "best": checkpointer.best_step()}.get(step, step)
    if chosen is None or int(chosen) not in steps:
        raise CheckpointError(f"--init_from={folder}:{step}: no such checkpoint; {folder} has steps {steps}")
    return int(chosen)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def _shape(specs: Mapping[str, Any], place: Place) -> tuple[Any, list[int]]:
    """dtype and shape of a parameter; of one layer, where the array holds a run of them."""
    spec = specs[place.array]
    return spec.dtype, list(spec.shape if place.index is None else spec.shape[1:])


def _split(source: str) -> tuple[str, str]:
    folder, _, step = source.rpartition(":")
    if not folder or not (step in ("latest", "best") or (step.isascii() and step.isdigit())):
        folder, step = source, "latest"
    return str(pathlib.Path(folder).resolve()), step


def _params(specs: dict[str, Any]) -> dict[str, Any]:
    return {name: spec for name, spec in specs.items() if name.startswith("params/")}


def _misfit(wanted: tuple[Any, list[int]], saved: tuple[Any, list[int]] | None) -> str:
    if saved is None:
        return "the checkpoint lacks it"
    return "" if saved == wanted else f"{saved[0]}{saved[1]} there, {wanted[0]}{wanted[1]} here"
