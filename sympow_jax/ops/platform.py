"""The platform that programs are being built for: this process's own, unless another is named."""

from typing import Any

import jax

_target: Any = jax.make_user_context("")


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
