"""Several processes as one run: by flags, or as the launcher tells JAX (TPU, GKE, SLURM, Open MPI)."""

import contextlib
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from sympow_jax.sharding.peers import HEARTBEAT_SECONDS
from sympow_jax.sharding.roll_call import roll_call

_QUIET, _LIMIT = 5.0, 300.0  # seconds without a word, and until the end
_JAX_LIMIT = int(_LIMIT) + 60  # later than ours: JAX aborts
_VARIABLES = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
    "GKE": ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"),
}  # of each launcher; without the first it is not recognised


def join_processes(
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> None:
    """Connects this process to the others of its run; does nothing for a run of one process.

    Args:
      coordinator_address: host:port of process 0, with num_processes and process_id, where no launcher is known.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      heartbeat_seconds: how long to wait for a process that does not come, where the three are given (see `watch`).

    Raises:
      ValueError: in one line, for some of the three without the others, or numbers that do not fit.
    """
    # Ours come first: JAX's own end is a C++ stack.
    limits: dict[str, Any] = {
        "initialization_timeout": _JAX_LIMIT,
        "heartbeat_timeout_seconds": int(3 * heartbeat_seconds) + 60,
    }
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(given):
        if not all(given):
            raise ValueError(
                f"--coordinator_address = {coordinator_address!r}, --num_processes = {num_processes}, --process_id = "
                f"{process_id}: give all three, or none under a launcher (TPU, GKE, SLURM, Open MPI)"
            )
        if process_id >= num_processes:
            raise ValueError(f"--process_id = {process_id}: must be below --num_processes = {num_processes}")
        roll_call(coordinator_address, num_processes, process_id, heartbeat_seconds)
        flags = f"--coordinator_address = {coordinator_address!r}, --num_processes = {num_processes}"
        told = f"{flags}, --process_id = {process_id}"
        with _waiting(told, "leave out the three flags", min(heartbeat_seconds, _LIMIT)):  # they were there just now
            jax.distributed.initialize(coordinator_address, num_processes, process_id, **limits)
    elif name := launcher():
        variables = [variable for variable in _VARIABLES.get(name, ()) if variable in os.environ]
        told = ", ".join(f"{variable} = {os.environ[variable]}" for variable in variables)
        alone = f"unset {variables[0]}" if variables else "use a machine of its own"
        with _waiting(f"{name} ({told})" if told else name, alone, _LIMIT):
            jax.distributed.initialize(**limits)


@contextlib.contextmanager
def _waiting(told: str, alone: str, limit: float) -> Iterator[None]:
    """Says after a while who is waited for, why and how not to, and ends the process when nobody came.

    JAX itself is silent until it aborts the process, which no handler sees.
    """
    joined = threading.Event()

    def watch() -> None:
        if joined.wait(_QUIET):
            return
        why = f"the other processes of this run, as {told} says; to run in this process alone, {alone}"
        print(f"waiting up to {limit:g} s for {why}", file=sys.stderr, flush=True)
        if not joined.wait(limit - _QUIET):
            print(f"error: waited {limit:g} s in vain for {why}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="join-processes", daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"{told}: {' '.join(str(error).split())[:300]}; to run in this process alone, {alone}"
        ) from None
    finally:
        joined.set()


def launcher() -> str:
    """Who started this process as one of several, or on a TPU VM, where it may be one of several; "" if nobody did."""
    env = os.environ
    if _count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if _count("SLURM_NTASKS") > 1 and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return "SLURM"
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return "Kubernetes"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "GKE"
    chips = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return "TPU VM" if chips and importlib.util.find_spec("libtpu") else ""


def _count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.strip().isdigit():
        raise ValueError(f"{variable} = {text!r}: must be a number of processes; unset it to run in this one alone")
    return int(text)
