"""The platform that programs are being built for: this process's own, unless another is named."""

from typing import Any

import jax

_target: Any = jax.make_user_context("")
_interpretation: Any = jax.make_user_context(None)


def target_platform() -> str:
    """cpu, gpu or tpu: what the program being traced will run on."""
    return _target.value or jax.default_backend()


def compiling_for(platform: str):
    """A context in which programs are traced for `platform` (cpu, gpu or tpu) instead of the default backend.

    The platform is part of jit's cache key: a function traced inside is traced again outside.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform={platform!r}: choose cpu, gpu or tpu")
    return _target(platform)


def unsplit() -> bool:
    """Whether the program is surely that of one device: inside shard_map, on a mesh of one, or alone in a process."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)


def interpretation() -> Any:
    """How kernels of TPUs are to be interpreted instead of compiled, as `pallas_call` takes it; None: they are not."""
    return _interpretation.value


def interpreting(how: Any = True):
    """A context in which kernels of TPUs run on any platform, slowly; `how` is True or `pltpu.InterpretParams`."""
    return _interpretation(how)
