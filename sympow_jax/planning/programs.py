"""What a compiler makes of a lowered function; kept in a folder, so that a new account of it needs no compiler.

A program is found again by what the compiler was given: the function's text with the names of its scopes, the target,
the options, the flags in the environment and the versions. Any change of the model, the mesh or an op is another
program; a change of the planner is not, nor, as long as `jax_traceback_in_locations_limit` is 0, are other lines of the
source.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import time
import zlib
from typing import Any

import jax

from sympow_jax.files import write_bytes_atomic
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
    kept = _read(path) if path else None
    if kept:
        return kept
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
        write_bytes_atomic(path, gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), compresslevel=3))
    return result


def compiler_flags() -> tuple[str, ...]:
    """What the compilers read in the environment, of what is set there."""
    return tuple(f"{name}={os.environ[name]}" for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") if os.environ.get(name))


def _read(path: pathlib.Path) -> Compiled | None:
    """The program kept there; None where there is none, or one that cannot be read."""
    try:
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, zlib.error, ValueError, TypeError):
        return None


def _key(lowered: Any, target: Target, options: dict[str, str] | None) -> str:
    parts = (lowered.as_text(debug_info=True), target.name, str(options), jax.__version__, compiler(target.platform))
    return hashlib.sha256("\n".join((*parts, *compiler_flags())).encode()).hexdigest()[:32]
