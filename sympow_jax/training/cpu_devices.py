"""How many CPU devices a run, or its evaluation, has: decided from its config, before JAX starts."""

import math
import os

from sympow_jax.config import Config, ConfigError

_AXES = ("data", "fsdp", "tensor", "seq")


def num_cpu_devices(config: Config, cores: int) -> int:
    """mesh.cpu_devices, where it is not -1; else the most of `cores` that the other axes fill and the batch divides by.

    XLA splits the work of one device over the cores operation by operation; devices that have rows of their own wait
    for each other once a step (RESULTS.md, training step).
    """
    mesh = config.mesh
    if mesh.cpu_devices != -1:
        return mesh.cpu_devices
    sizes = {axis: getattr(mesh, axis) for axis in _AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    for devices in range(cores, 1, -1):
        filled = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
        rows = filled["data"] * filled["fsdp"] * config.optimizer.accumulation_steps
        if math.prod(filled.values()) == devices and config.data.batch_size % rows == 0:
            return devices
    return 1


def use_cpu_devices(config: Config) -> None:
    """Makes JAX, which has not looked for its devices yet, find `num_cpu_devices` of the CPU.

    Where the environment says how many there are, and in one of several processes, -1 leaves them as they are.

    Raises:
      ConfigError: the environment names a number too.
    """
    import jax

    wanted, name = config.mesh.cpu_devices, _named_by_environment()
    if name and wanted != -1:
        raise ConfigError(f"mesh.cpu_devices = {wanted}: {name} names a number too; use -1, or unset {name}")
    if not name and (wanted != -1 or not jax.distributed.is_initialized()):
        jax.config.update("jax_num_cpu_devices", num_cpu_devices(config, _cores()))


def use_cpu_devices_of_run(config: Config) -> None:
    """The same for an evaluation: as many as the run had, at most one a core, unless something else says."""
    import jax

    if not (_named_by_environment() or jax.distributed.is_initialized()):
        jax.config.update("jax_num_cpu_devices", min(max(config.mesh.cpu_devices, 1), _cores()))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _named_by_environment() -> str:
    """The variable that says how many CPU devices there are, "" for none."""
    elsewhere = {"JAX_NUM_CPU_DEVICES": "", "XLA_FLAGS": "xla_force_host_platform_device_count"}
    return next((name for name, mark in elsewhere.items() if name in os.environ and mark in os.environ[name]), "")
