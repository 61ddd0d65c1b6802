"""From a compiled config to numbers: one JSON object a plan, a table for people, and a matrix of several."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from sympow_jax.config import Config, attention_specs
from sympow_jax.models import flops
from sympow_jax.planning import hlo, work
from sympow_jax.planning.collectives import Collective, collectives, network_seconds, summed
from sympow_jax.planning.compile import Built, Memory, Step, memory_knobs
from sympow_jax.planning.errors import PlanError
from sympow_jax.planning.kernel_report import kernel_report, kernel_text
from sympow_jax.planning.kernels import Call, calls
from sympow_jax.planning.roofline import roofline
from sympow_jax.planning.schedules import Schedule
from sympow_jax.planning.targets import GIB, Target, compiler
from sympow_jax.planning.traffic import memory_bytes

Plan = dict[str, Any]


def plan(built: Built, target: Target, schedule: Callable[[Call], Schedule] | None = None) -> Plan:
    """All that a compiled config tells, as plain numbers (bytes, FLOPs, seconds; of one device unless named so).

    With `schedule`, which is asked for TPUs only, the kernels' static time counts.
    """
    config, mesh = built.config, dict(built.mesh.shape)
    devices = list(built.mesh.devices.flat)
    program = hlo.parse(built.train.text)
    found = collectives(program, mesh)
    attention, rest = flops.train_flops_per_token(config, built.params, config.data.seq_len)
    tokens = config.data.batch_size * config.data.seq_len
    called = calls(program, built.train.kernels)
    listed = [kernel_report(call, target, schedule) for call in called]
    done = work.flops(program, built.train.kernels)
    touched = memory_bytes(program, built.train.kernels)
    moved = memory_bytes(program, built.train.kernels, target.device.cache_bytes)
    bounds = roofline(
        target,
        num_devices=len(devices),
        flops=done,
        memory_bytes=moved,
        network_seconds=network_seconds(found, target, devices),
        model_flops=(attention + rest) * tokens,
        tokens_per_step=tokens,
        num_steps=config.num_train_steps,
        beyond_peak=sum(row["times"] * row["beyond_peak"] for row in listed),
    )
    steps = {"train": built.train, "evaluation": built.evaluation}
    over = [name for name, step in steps.items() if not step.memory.fits]
    result = header(config, target) | {
        "status": "does not fit" if over else "fits",
        "reason": _reason(steps[over[0]].memory, over[0], config, target) if over else "",
        "mesh": mesh,
        "memory": {name: _memory(step.memory) for name, step in steps.items()},
        "flops": {
            "model_per_step": (attention + rest) * tokens,
            "model_attention_per_token": attention,
            "model_rest_per_token": rest,
            "program_per_device": sum(done.values()),
            "program_by_type": done,
            "compiler_per_device_loops_once": built.train.compiler_flops,
        },
        "memory_traffic": moved,
        "cache_traffic": touched - moved,
        "kernels": listed,
        "unknown": sorted(program.unknown_loops() | {c.name for c in called if not (c.kernel and c.kernel.flops)}),
        "collectives": [_collective(c) for c in summed(found)],
        "roofline": dataclasses.asdict(bounds),
        "compile_seconds": {name: step.seconds for name, step in steps.items()},
    }
    if target.platform == "gpu" and not over and _peak(steps) > 0.75 * target.device.hbm_bytes:
        fraction = math.ceil(100 * _peak(steps) / target.device.hbm_bytes) / 100
        result["reason"] = f"needs XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:g} (JAX's default is 0.75)"
    return result


def failure(config: Config, target: Target, error: PlanError) -> Plan:
    """A config that the compiler refuses."""
    status = "does not fit" if error.kind == "memory" else f"{error.kind} error"
    return header(config, target) | {"status": status, "reason": str(error)}


def header(config: Config, target: Target) -> Plan:
    """What is planned."""
    d, kernels = config.data, [spec.attention.kernel for spec in attention_specs(config)]
    return {
        "compiled_for": target.name,
        "compiler": compiler(target.platform),
        "devices": len(target.devices),
        "variant": config.variant,
        "degree": config.attention.degree if "power" in kernels else 0,
        "implementation": config.attention.implementation,
        "context": d.seq_len,
        "batch_size": d.batch_size,
        "tokens_per_step": d.seq_len * d.batch_size,
        "num_train_steps": config.num_train_steps,
        "remat": config.model.remat,
        "accumulation_steps": config.optimizer.accumulation_steps,
        "chunk_size": config.attention.chunk_size,
    }


def _peak(steps: dict[str, Step]) -> float:
    return max(step.memory.total for step in steps.values())


def _reason(memory: Memory, name: str, config: Config, target: Target) -> str:
    over = memory.total - memory.capacity
    return (
        f"the {name} step needs {memory.total / GIB:.2f} GiB of {memory.capacity / GIB:.2f} GiB of device memory, "
        f"{over / GIB:.2f} GiB too much; {memory_knobs(config, target)}"
    )


def _memory(memory: Memory) -> dict[str, Any]:
    return dataclasses.asdict(memory) | {"total": memory.total, "spare": memory.capacity - memory.total}


def _collective(collective: Collective) -> dict[str, Any]:
    return {"kind": collective.kind, "axis": collective.axis, "count": collective.count, "bytes": collective.bytes}


def mesh_text(plan: Plan) -> str:
    """data 8 x seq 2, the axes of one left out."""
    return " x ".join(f"{axis} {size}" for axis, size in plan.get("mesh", {}).items() if size > 1) or "one device"


def table(plan: Plan) -> Table:
    """One plan for people."""
    title = f"{plan['variant']}, context {plan['context']:,}: compiled for {plan['compiled_for']}"
    rows = Table(title=title, title_justify="left", show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("result", plan["status"] + (f": {plan['reason']}" if plan["reason"] else ""))
    if "memory" not in plan:
        return rows
    rows.add_row("mesh", f"{mesh_text(plan)} of {plan['devices']} devices")
    rows.add_row(
        "step",
        f"{plan['batch_size']} x {plan['context']:,} tokens, remat {plan['remat']}, accumulation "
        f"{plan['accumulation_steps']}, {plan['implementation']}, chunk_size {plan['chunk_size']}",
    )
    for name, memory in plan["memory"].items():
        rows.add_row(f"memory, {name}", _memory_text(memory))
    _add_work(rows, plan)
    r = plan["roofline"]
    rows.add_row(
        "at best",
        f"compute {r['compute_seconds']:.3g} s, memory {r['memory_seconds']:.3g} s, network "
        f"{r['network_seconds']:.3g} s: {r['step_seconds']:.3g} s a step, bound by {r['bound']}",
    )
    rows.add_row("at best", f"MFU {r['mfu']:.1%}, {r['tokens_per_second']:,.0f} tokens/s, {_days(plan)}")
    seconds = plan["compile_seconds"]
    by = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    rows.add_row("compiled in", f"{by}, by {plan['compiler']}")
    return rows


def _days(plan: Plan) -> str:
    r, tokens = plan["roofline"], plan["num_train_steps"] * plan["tokens_per_step"]
    return f"{r['tokens_per_day']:.3g} tokens a day, {r['days']:.2g} days for {tokens:.3g} tokens"


def _memory_text(memory: dict[str, float]) -> str:
    parts = [f"{name} {memory[name] / GIB:.2f}" for name in ("parameters", "optimizer", "batch", "temporaries")]
    return (
        f"{memory['total'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB a device ({', '.join(parts)}); "
        f"{memory['spare'] / GIB:+.2f} spare"
    )


def _add_work(rows: Table, plan: Plan) -> None:
    f = plan["flops"]
    useful = f["model_per_step"] / plan["devices"]
    rows.add_row(
        "FLOPs a step",
        f"model {f['model_per_step']:.4g} ({useful:.4g} a device); program {f['program_per_device']:.4g} a device; "
        f"compiler's count {f['compiler_per_device_loops_once']:.4g} (loop bodies once)",
    )
    cached = f"; {plan['cache_traffic'] / 1e9:.4g} GB more in the cache" if plan["cache_traffic"] else ""
    rows.add_row("memory traffic", f"{plan['memory_traffic'] / 1e9:.4g} GB a device and step{cached}")
    for k in plan["kernels"]:
        rows.add_row(k["name"], kernel_text(k))
    if plan["unknown"]:
        rows.add_row("not counted", "loops as one turn, kernels as nothing: " + ", ".join(plan["unknown"]))
    for c in plan["collectives"][:8]:
        rows.add_row(
            c["kind"], f"{c['bytes'] / 1e6:,.2f} MB a device and step over {c['axis']}, {c['count']:,.0f} times"
        )


def matrix(plans: Sequence[Plan]) -> str:
    """Markdown: one row a config and target."""
    lines = [
        "| variant | context | compiled for | mesh | result | GiB a device | spare | bound | step at best | MFU "
        "at best | days at best | compile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        name = f"{p['variant']} p={p['degree']}" if p["degree"] > 2 else p["variant"]
        start = f"| {name} | {p['context']:,} | {p['compiled_for']} "
        if "memory" not in p:
            lines.append(f"{start}| | {p['status']}: {p['reason']} | | | | | | | |")
            continue
        m, r = p["memory"]["train"], p["roofline"]
        lines.append(
            f"{start}| {mesh_text(p)} | {p['status']}{': ' + p['reason'] if p['reason'] else ''} "
            f"| {m['total'] / GIB:.2f} | {m['spare'] / GIB:+.2f} | {r['bound']} | {r['step_seconds']:.3g} s "
            f"| {r['mfu']:.0%} | {r['days']:.2g} | {sum(p['compile_seconds'].values()):.0f} s |"
        )
    return "\n".join(lines) + "\n"
