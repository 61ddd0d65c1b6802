"""Several processes as one run: by flags, or as the launcher tells JAX (TPU, GKE, SLURM, Open MPI)."""

import importlib.util
import os
import pathlib

import jax


def join_processes(coordinator_address: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Connects this process to the others of its run; does nothing for a run of one process.

    Args:
      coordinator_address: host:port of process 0, with num_processes and process_id, where no launcher is known.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      ValueError: in one line, for some of the three without the others, or numbers that do not fit.
    """
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(given):
        if not all(given):
            raise ValueError(
                f"--coordinator_address = {coordinator_address!r}, --num_processes = {num_processes}, --process_id = "
                f"{process_id}: give all three, or none under a launcher (TPU, GKE, SLURM, Open MPI)"
            )
        if process_id >= num_processes:
            raise ValueError(f"--process_id = {process_id}: must be below --num_processes = {num_processes}")
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif launcher():
        jax.distributed.initialize()


def launcher() -> str:
    """Who started this process as one of several, or on a TPU VM, where it may be one of several; "" if nobody did."""
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        return "SLURM"
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return "Kubernetes"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "GKE"
    chips = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return "TPU VM" if chips and importlib.util.find_spec("libtpu") else ""
