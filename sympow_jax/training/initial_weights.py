"""Starting a run from the parameters of another: --init_from=WORKDIR[:STEP], weights only, whatever fits.

The other run may have had another context length, optimizer or variant: an array is taken when its name, shape and
dtype are those of the new model, and keeps its fresh initial value otherwise. What was and was not taken is printed and
recorded in init_from.json, from which a run killed before its first checkpoint starts again.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from sympow_jax.config import ConfigError
from sympow_jax.files import entry, read_json, write_json_atomic
from sympow_jax.models.model import Model
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import CheckpointError, fill, flatten, unflatten
from sympow_jax.typing import PyTree

RECORD = "init_from.json"


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """What to take from where.

    Attributes:
      workdir: absolute path of the other run.
      step: of its checkpoint.
      taken: names of the arrays taken.
      kept: those that stay as initialised, and why.
      unused: arrays of the checkpoint that the model has no use for.
      tokenizer: "same" or "another": whether token ids mean the same.
    """

    workdir: str
    step: int
    taken: list[str]
    kept: dict[str, str]
    unused: list[str]
    tokenizer: str

    def apply(self, params: PyTree) -> PyTree:
        """`params` with the arrays taken, verified, with the shardings of `params`."""
        target = flatten({"params": params})
        with Checkpointer(pathlib.Path(self.workdir) / "checkpoints", read_only=True) as checkpointer:
            specs, _ = checkpointer.describe(self.step)
            like = {name: target[name] if name in self.taken else spec for name, spec in _params(specs).items()}
            saved = flatten(checkpointer.restore(self.step, like=unflatten(like)).tree)
        return fill({"params": params}, target | {name: saved[name] for name in self.taken})["params"]

    def describe(self) -> str:
        """One line, and one for each array not taken."""
        total = len(self.taken) + len(self.kept)
        lines = [f"starts from {len(self.taken)} of {total} arrays of {self.workdir}, step {self.step}"]
        lines += [f"  {name} keeps its initial value: {reason}" for name, reason in self.kept.items()]
        lines += [f"  {name} of the checkpoint is not used" for name in self.unused]
        if self.tokenizer != "same":
            lines.append("  its tokeniser was another: its embedding and output rows stand for other tokens")
        return "\n".join(lines)

    def record(self, workdir: str) -> None:
        """Writes init_from.json."""
        write_json_atomic(pathlib.Path(workdir) / RECORD, dataclasses.asdict(self))


def plan_initial_weights(
    source: str, workdir: str, model: Model, tokenizer_digest: str, *, has_checkpoints: bool
) -> InitialWeights | None:
    """What a run in `workdir` starts from; reads manifests only. None: from scratch, or from its own checkpoints.

    Args:
      source: WORKDIR or WORKDIR:STEP, STEP being latest, best or a number; "" for what the workdir has recorded.
      workdir: of the new run.
      model: of the new run.
      tokenizer_digest: of the new run.
      has_checkpoints: the new run has begun already.

    Raises:
      ConfigError: the workdir's run started otherwise, or nothing fits.
      CheckpointError: there is no such step.
    """
    path = pathlib.Path(workdir) / RECORD
    recorded = read_json(path) if path.exists() else None
    if recorded:
        for name, kind in (("workdir", str), ("step", int)):
            entry(recorded, name, kind, str(path))
    folder, step = _split(source) if source else ("", "")
    if source and (recorded or has_checkpoints):
        started = f"{recorded['workdir']}:{recorded['step']}" if recorded else "scratch"
        same = recorded and folder == recorded["workdir"] and step in ("latest", "best", str(recorded["step"]))
        if not same:
            raise ConfigError(f"--init_from={source}: the run in {workdir} started from {started}; use another workdir")
    if has_checkpoints or not (source or recorded):
        return None
    if recorded:
        folder, step = recorded["workdir"], str(recorded["step"])
    return _plan(folder, step, model, tokenizer_digest)


def _plan(folder: str, step: str, model: Model, tokenizer_digest: str) -> InitialWeights:
    with Checkpointer(pathlib.Path(folder) / "checkpoints", read_only=True) as checkpointer:
        steps = checkpointer.steps()
        chosen = {"latest": max(steps, default=None), "best": checkpointer.best_step()}.get(step, step)
        if chosen is None or int(chosen) not in steps:
            raise CheckpointError(f"--init_from={folder}:{step}: no such checkpoint; {folder} has steps {steps}")
        specs, _ = checkpointer.describe(int(chosen))
    saved = _params(specs)
    wanted = flatten({"params": jax.eval_shape(model.init, jax.random.key(0))})
    kept = {name: reason for name in wanted if (reason := _misfit(wanted[name], saved.get(name)))}
    taken = [name for name in wanted if name not in kept]
    if not taken:
        first, reason = next(iter(kept.items()))
        raise ConfigError(
            f"--init_from={folder}:{chosen}: none of its {len(saved)} arrays fits this model ({first}: {reason}); "
            "compare the two config.json, or leave --init_from out"
        )
    unused = [name for name in saved if name not in wanted]
    digest = read_json(pathlib.Path(folder) / "data.json").get("tokenizer_digest")
    return InitialWeights(folder, int(chosen), taken, kept, unused, "same" if digest == tokenizer_digest else "another")


def _split(source: str) -> tuple[str, str]:
    folder, _, step = source.rpartition(":")
    if not folder or not (step in ("latest", "best") or step.isdigit()):
        folder, step = source, "latest"
    return str(pathlib.Path(folder).resolve()), step


def _params(specs: dict[str, Any]) -> dict[str, Any]:
    return {name: spec for name, spec in specs.items() if name.startswith("params/")}


def _misfit(wanted: Any, saved: Any) -> str:
    if saved is None:
        return "the checkpoint lacks it"
    if saved.shape != wanted.shape or saved.dtype != wanted.dtype:
        return f"{saved.dtype}{list(saved.shape)} there, {wanted.dtype}{list(wanted.shape)} here"
    return ""
