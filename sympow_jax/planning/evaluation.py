"""The memory of an evaluation at each of its lengths: the programs of `evals/streaming.py`, compiled for a target."""

import pathlib
from typing import Any

from rich.table import Table

from sympow_jax.config import Config
from sympow_jax.evals.length_generalisation import DOCUMENTS_AT_ONCE
from sympow_jax.evals.streaming import Scorer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.ops.platform import compiling_for
from sympow_jax.planning.compile import device_bytes, explain
from sympow_jax.planning.programs import compile_lowered
from sympow_jax.planning.report import Plan, header
from sympow_jax.planning.targets import GIB, Target
from sympow_jax.training.config_mesh import make_mesh
from sympow_jax.training.evaluation_mesh import evaluation_sizes
from sympow_jax.training.train_state import abstract_params


def plan_evaluation(config: Config, vocab_size: int, target: Target, folder: pathlib.Path | None = None) -> Plan:
    """Bytes of one device for each of evaluation.lengths, on the mesh that eval.py would take there.

    "evaluations" has an entry a length: "length", "windows" and "tokens" of a call, "memory" by class ("parameters",
    "state", "temporaries", "total", "capacity"), "status", and the "reason" where it does not fit or cannot be built.
    """
    with compiling_for(target.platform):
        config = resolve_implementation(config)
        mesh = make_mesh(evaluation_sizes(config, {}, target.devices), target.devices)
        model = Model(config, vocab_size, mesh)
        e = config.evaluation
        sizes = {"chunk_size": e.chunk_size, "batch_size": DOCUMENTS_AT_ONCE, "num_windows": e.num_documents}
        scorer = Scorer(model, abstract_params(model), bos_id=0, **sizes)
        entries = [_entry(scorer, model, length, target, folder) for length in sorted(e.lengths)]
    fits = [entry["length"] for entry in entries if entry["status"] == "fits"]
    return header(config, target) | {
        "status": "fits" if len(fits) == len(entries) else "does not fit",
        "mesh": dict(mesh.shape),
        "evaluations": entries,
    }


def _entry(scorer: Scorer, model: Model, length: int, target: Target, folder: pathlib.Path | None) -> dict[str, Any]:
    windows, tokens = scorer.call_shape(length)
    state = model.abstract_state(windows, length) if scorer.carries_state(length) else None
    entry = {"length": length, "windows": windows, "tokens": tokens, "status": "fits", "reason": ""}
    try:
        compiled = compile_lowered(scorer.trace(length, state).lower(), target, folder)
    except Exception as error:  # the compilers' errors have no common type
        problem = explain(str(error), model.config, target)
        status = "does not fit" if problem.kind == "memory" else "cannot be built"
        return entry | {"memory": None, "status": status, "reason": str(problem)}
    parameters = device_bytes(scorer.params)
    kept = compiled.argument_bytes - parameters
    memory = {"parameters": parameters, "state": kept, "temporaries": compiled.other_bytes}
    memory |= {"total": sum(memory.values()), "capacity": target.capacity}
    over = memory["total"] > memory["capacity"]
    reason = "lower --config.evaluation.chunk_size, or cut parameters (mesh.fsdp) or time (mesh.seq)"
    return entry | {"memory": memory} | ({"status": "does not fit", "reason": reason} if over else {})


def evaluation_table(plan: Plan) -> Table:
    """GiB of one device at each length, and what is wrong with those that do not fit."""
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    reasons = [f"{entry['length']:,}: {entry['reason']}" for entry in plan["evaluations"] if entry["reason"]]
    title = f"{plan['variant']} evaluated on {plan['compiled_for']}, {axes}; GiB of a device"
    table = Table(title=title, caption="\n".join(reasons), title_justify="left", caption_justify="left")
    for column in ("length", "windows", "tokens", *_CLASSES, "status"):
        table.add_column(column, justify="left" if column == "status" else "right")
    for entry in plan["evaluations"]:
        memory = entry["memory"] or {}
        numbers = [f"{memory[name] / GIB:.3f}" if memory else "-" for name in _CLASSES]
        shape = (f"{entry[name]:,}" for name in ("length", "windows", "tokens"))
        table.add_row(*shape, *numbers, entry["status"])
    return table


_CLASSES = ("parameters", "state", "temporaries", "total", "capacity")
