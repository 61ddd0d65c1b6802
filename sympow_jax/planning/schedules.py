"""Static schedules of TPU kernels, read off what libtpu dumps of them.

A bundle is an instruction word of the compiler's final schedule: one cycle, without waiting for memory. The compiler
reads where to dump only once, so each kernel that is asked for is compiled again, alone, in a process of its own:

    python -m sympow_jax.planning.schedules TOPOLOGY < CALL    (a call as JSON; prints the schedule)
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from sympow_jax.files import write_text_atomic
from sympow_jax.planning import targets
from sympow_jax.planning.errors import PlanError
from sympow_jax.planning.kernels import Call
from sympow_jax.planning.programs import compiler_flags

_DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32", "s8": "int8", "pred": "bool"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of one step of a kernel's grid.

    Attributes:
      bundles: all of the program, branches that only some steps take included.
      matrix_busy: share of them in which a slot of the matrix units is taken.
    """

    bundles: int
    matrix_busy: float


def dumping_to(folder: str) -> dict[str, str]:
    """The environment of a process whose TPU compiler leaves its schedules in `folder`, with this one's flags."""
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), dump]).strip(),
    }


def largest(folder: pathlib.Path) -> Schedule | None:
    """The schedule of the largest program dumped there; None where there is none."""
    found = []
    for path in folder.glob("*final_hlo-static-per-bundle-utilization.txt"):
        _, names, capacities, _, *rows = path.read_text().splitlines()
        slot = [name.strip() for name in names.split(",")].index("MXU")
        used = [int(row.split()[slot]) for row in rows if re.fullmatch(r"\d+( \d+)*", row.strip())]
        found.append((len(used), sum(used) / (len(used) * int(capacities.split()[slot]))))
    return Schedule(*max(found)) if found else None


def schedule(call: Call, target: targets.Target, folder: pathlib.Path | None = None) -> Schedule:
    """The schedule of a kernel of a compiled program; a folder keeps it, see `programs.py`.

    Raises:
      PlanError: its compiler fails, or leaves no schedule.
    """
    text = json.dumps({name: getattr(call, name) for name in ("operands", "results", "config")}, default=vars)
    kind = target.name.partition(":")[0]
    key = hashlib.sha256("\n".join((text, kind, targets.compiler("tpu"), *compiler_flags())).encode()).hexdigest()[:32]
    path = folder / f"{key}.schedule.json" if folder else None
    kept = _read(path) if path else None
    if kept:
        return kept
    found = _made(call.name, text, target)
    if path:
        write_text_atomic(path, json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def _made(name: str, text: str, target: targets.Target) -> Schedule:
    """The schedule of the call in `text`, compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "sympow_jax.planning.schedules", target.name]
        done = subprocess.run(command, env=os.environ | dumping_to(dump), input=text, capture_output=True, text=True)
        found = None if done.returncode else largest(pathlib.Path(dump))
    if found:
        return found
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    fault = f"exit {done.returncode}: {last[:300]}" if done.returncode else "no schedule was dumped"
    raise PlanError("kernel", f"{name} for {target.name}: {fault}; plan without --kernels")


def _read(path: pathlib.Path) -> Schedule | None:
    """The schedule kept there; None where there is none, or one that cannot be read."""
    try:
        return Schedule(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def seconds(call: Call, found: Schedule, target: targets.Target) -> float:
    """Of one call, with a bundle in the time that the matrix units take at their peak; on all cores of a device."""
    steps = call.kernel.steps if call.kernel else 0
    return found.bundles * steps * 2 * target.device.matrix_macs / target.device.peak


def _compile(call: dict[str, Any], topology: str) -> None:
    sharding = SingleDeviceSharding(targets.find(topology).devices[0])

    def arrays(shapes: list[dict[str, Any]], **options: Any) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(s["dims"], _DTYPES[s["dtype"]], **options) for s in shapes]

    kernel = jax.ffi.ffi_call(
        "tpu_custom_call", arrays(call["results"]), custom_call_api_version=1, legacy_backend_config=call["config"]
    )
    jax.jit(lambda *x: kernel(*x)).lower(*arrays(call["operands"], sharding=sharding)).compile()


if __name__ == "__main__":
    _compile(json.load(sys.stdin), sys.argv[1])
