"""What the processes of one run must have in common, asked before the first step: settings, versions, data, workdir.

Otherwise they would train on, each its own way, or wait for each other for ever.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import secrets
import time
from typing import Any

import jax

import sympow_jax
from sympow_jax.config import Config, flatten
from sympow_jax.sharding.agreement import agree, gather
from sympow_jax.sharding.peers import coordination
from sympow_jax.training.data import RunData
from sympow_jax.training.workdir import WorkdirError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_NUMERICS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)  # fmt: skip
_SEEN_WITHIN = 10.0  # seconds until a file of another host must show


def check_settings(config: Config, **switches: Any) -> None:
    """Raises ValueError, in all processes, where their configs, flags, versions or kinds of device differ."""
    if coordination()[0] is None:
        return
    facts = flatten(dataclasses.asdict(config)) | {f"--{name}": value for name, value in switches.items()}
    agree("settings", facts | versions(), advice="start every process with the same flags and software")


def check_same_data(config: Config, data: RunData) -> None:
    """Raises ValueError, in all processes, where their stores, tokenisers, chosen kernels or devices differ."""
    facts = {f"data.{name}": value for name, value in data.describe().items()} | {
        "attention.implementation": config.attention.implementation,
        "platform": jax.default_backend(),
    }
    advice = "every process must read the same stores on the same kind of device; copy a store from one machine to all"
    agree("data", facts, advice=advice)


def check_store(name: str, digest: str) -> None:
    """Raises ValueError, in all processes, where what they evaluate on is not the same."""
    facts = {f"--data={name}": digest, "platform": jax.default_backend()}
    agree("store", facts, advice="every process must read the same store on the same kind of device")


def versions() -> dict[str, str]:
    """Of all that decides what a process computes: Python, packages, this package's source, JAX's settings."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    settings = {name: str(getattr(jax.config, name)) for name in _NUMERICS}
    return {
        "python": platform.python_version(),
        **found,
        "sympow_jax": sympow_jax.__version__,
        "sympow_jax source": _source_digest(),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        **settings,
    }


def _source_digest() -> str:
    root = pathlib.Path(sympow_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_shared(workdir: str, *, seconds: float = _SEEN_WITHIN) -> None:
    """Raises WorkdirError, in all processes, unless the workdir is one folder that they all see.

    Process 0 writes a file there, whose name the others then look for; it is removed before this returns.
    """
    _, index, count = coordination()
    if count == 1:
        return
    first = index == 0
    name, problem = f".shared.{secrets.token_hex(8)}", ""
    if first:
        try:
            pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
            (pathlib.Path(workdir) / name).touch(exist_ok=False)
        except OSError as error:
            problem = error.strerror or str(error)
    try:
        name, problem = gather("shared folder", [name, problem])[0]
        if problem:
            raise WorkdirError(f"--workdir={workdir} cannot be written by process 0 ({problem})")
        seen = gather("shared file seen", [_appears(pathlib.Path(workdir) / name, seconds), platform.node()])
    finally:
        if first:
            with contextlib.suppress(OSError):  # where it could not be made
                (pathlib.Path(workdir) / name).unlink()
    blind = [f"process {i} (host {host})" for i, (sees, host) in enumerate(seen) if not sees]
    if blind:
        raise WorkdirError(
            f"--workdir={workdir}: {', '.join(blind[:4])} does not see what process 0 ({seen[0][1]}) writes there; "
            "it must be one folder that all hosts share, under the same path"
        )


def _appears(path: pathlib.Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
