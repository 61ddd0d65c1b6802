"""What a compiler makes of a lowered function; kept in a folder, so that a new account of it needs no compiler.

A program is found again by what the compiler was given: the function's text with the names of its scopes, the target,
the options and the versions. Any change of the model, the mesh or an op is another program; a change of the planner is
not, nor, as long as `jax_traceback_in_locations_limit` is 0, are other lines of the source.
"""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import time
from typing import Any

import jax

from sympow_jax.planning.targets import Target, compiler


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program's text and the compiler's own account of it.

    Attributes:
      text: the optimised HLO.
      argument_bytes: of one device.
      other_bytes: of one device: temporaries, and results that are not arguments.
      flops: with loop bodies once.
      seconds: that the compiler took.
    """

    text: str
    argument_bytes: float
    other_bytes: float
    flops: float
    seconds: float


def compile_lowered(lowered: Any, target: Target, folder: pathlib.Path | None) -> Compiled:
    """The compiled program, from `folder` if it is there, else left there."""
    options = {"xla_gpu_autotune_level": "0"} if target.platform == "gpu" else None
    path = folder / f"{_key(lowered, target, options)}.json.gz" if folder else None
    if path and path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    m = compiled.memory_analysis()
    result = Compiled(
        compiled.as_text(),
        float(m.argument_size_in_bytes),
        float(m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes),
        float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        seconds,
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), compresslevel=3))
    return result


def _key(lowered: Any, target: Target, options: dict[str, str] | None) -> str:
    parts = (lowered.as_text(debug_info=True), target.name, str(options), jax.__version__, compiler(target.platform))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
