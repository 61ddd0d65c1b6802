"""The hardware that plans are made for: devices, what they hold and move, and the compilers that know them.

    v5e:4x4     a TPU slice of 4 x 4 chips               h100:8      one host with 8 GPUs
    v5p:4x4x4   a TPU slice of 4 x 4 x 4 chips           h100:4x8    4 hosts with 8 GPUs each
    cpu:1       this machine (or N virtual devices)

Figures are one device's, from public data sheets. TPUs: Google Cloud documentation of each generation (system
architecture pages; interconnect = stated bidirectional figure / 2 / links, v4 and v5p 6 links, v5e and v6e 4, TPU7x 6
with two devices a chip). GPUs: NVIDIA data sheets of the SXM parts, dense bfloat16 without sparsity; interconnect =
NVLink, one direction; between hosts one network card for each GPU as in DGX systems (A100 200 Gb/s, others 400 Gb/s).
"""

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import importlib.util
import math
import os
import re
from typing import Any

import jax

from sympow_jax.config import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """One generation of device.

    Attributes:
      platform: cpu, gpu or tpu.
      hbm_bytes: device memory; for TPUs what libtpu's compiler lets a program use.
      peak: bfloat16 FLOP/s.
      peak_float32: FLOP/s of float32 products at default precision (TPU: one bfloat16 pass; GPU: TF32).
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s one way: of one torus link (TPU), of all links of a GPU.
      host_bandwidth: bytes/s one way between hosts, for one device; 0 where slices need none.
      torus_dims: dims of the interconnect (0: every device of a host reaches every other).
      wraps_at: a torus dim of a multiple of this many chips is a ring; others are lines.
      max_chips: of the largest slice that is offered.
      compiler_name: what the compiler calls it.
      matrix_macs: multiply-adds of the matrix units of a core in a cycle, where programs have static schedules (TPU).
      cache_bytes: of a GPU's L2; 0 where programs say themselves what stays on the chip.
    """

    platform: str
    hbm_bytes: float
    peak: float
    peak_float32: float
    hbm_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float = 0.0
    torus_dims: int = 0
    wraps_at: int = 0
    max_chips: int = 0
    compiler_name: str = ""
    matrix_macs: int = 0
    cache_bytes: float = 0.0


MIB, GIB = 2.0**20, 2.0**30
DEVICES = {
    "v4": Device("tpu", 30.75 * GIB, 275e12, 275e12, 1228e9, 50e9, torus_dims=3, wraps_at=4, max_chips=4096,
        matrix_macs=4 * 128**2),
    "v5e": Device("tpu", 15.75 * GIB, 197e12, 197e12, 819e9, 50e9, torus_dims=2, wraps_at=16, max_chips=256,
        matrix_macs=4 * 128**2),
    "v5p": Device("tpu", 95.73 * GIB, 459e12, 459e12, 2765e9, 100e9, torus_dims=3, wraps_at=4, max_chips=6144,
        matrix_macs=4 * 128**2),
    "v6e": Device("tpu", 31.24 * GIB, 918e12, 918e12, 1640e9, 100e9, torus_dims=2, wraps_at=16, max_chips=256,
        matrix_macs=2 * 256**2),
    "7x": Device(
        "tpu", 94.74 * GIB, 1153.5e12, 1153.5e12, 3690e9, 50e9, torus_dims=3, wraps_at=4, max_chips=9216,
        compiler_name="tpu7x", matrix_macs=2 * 256**2,
    ),
    "a100": Device("gpu", 85_100_068_864, 312e12, 156e12, 2039e9, 300e9, host_bandwidth=25e9, cache_bytes=40 * MIB),
    "h100": Device("gpu", 84_942_979_072, 989e12, 494.5e12, 3352e9, 450e9, host_bandwidth=50e9, cache_bytes=50 * MIB),
    "h200": Device("gpu", 151_397_597_184, 989e12, 494.5e12, 4800e9, 450e9, host_bandwidth=50e9, cache_bytes=50 * MIB),
    "b200": Device("gpu", 191_514_411_008, 2250e12, 1125e12, 7672e9, 900e9, host_bandwidth=50e9,
        cache_bytes=126.5 * MIB),
}  # fmt: skip
GPU_FRACTION = 0.92  # of a GPU's memory that JAX can be given; its default is 0.75

_SHAPES = {
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "7x": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind, and how they are connected.

    Attributes:
      name: as typed.
      device: the kind.
      devices: JAX devices without hardware behind them (cpu: real ones).
    """

    name: str
    device: Device
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.device.platform

    @property
    def capacity(self) -> float:
        """Bytes of one device that a program can use."""
        return self.device.hbm_bytes * (GPU_FRACTION if self.platform == "gpu" else 1.0)


def legal() -> list[str]:
    """A line for each kind of device: what can be named."""
    lines = [f"{name}: {', '.join(shapes.split())}" for name, shapes in _SHAPES.items()]
    for name, device in DEVICES.items():
        if device.platform == "gpu":
            lines.append(f"{name}: N (1 to 8 on one host) or HOSTSxN, for example {name}:8, {name}:4x8")
    return [*lines, "cpu: N virtual devices of this machine, for example cpu:1"]


def find(name: str) -> Target:
    """The target of `v5e:4x4`, `h100:8`, `h100:4x8` or `cpu:1`.

    Raises:
      ConfigError: an unknown kind, a shape that is not offered, or a missing compiler; one line with the way out.
    """
    kind, _, text = name.partition(":")
    kind = kind.removeprefix("tpu").removeprefix("v") if kind.endswith("7x") else kind
    if kind != "cpu" and kind not in DEVICES:
        hint = nearest(kind, [*DEVICES, "cpu"])
        raise ConfigError(
            f"--topology = {name!r}: choose one of {', '.join([*DEVICES, 'cpu'])}{hint}; --list shows all"
        )
    if not re.fullmatch(r"\d+(x\d+)*", text) or 0 in (shape := tuple(int(d) for d in text.split("x"))):
        raise ConfigError(f"--topology = {name!r}: expected KIND:SIZE, for example v5e:4x4, h100:8 or cpu:1")
    if kind == "cpu":
        return _cpu(name, shape)
    device = DEVICES[kind]
    devices = _tpu(name, kind, shape) if device.platform == "tpu" else _gpu(name, kind, shape)
    return Target(name, device, shape, tuple(devices))


def _cpu(name: str, shape: tuple[int, ...]) -> Target:
    devices = jax.devices("cpu")
    if math.prod(shape) > len(devices):
        raise ConfigError(
            f"--topology = {name!r}: this process has {len(devices)} CPU device(s); set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={math.prod(shape)}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / math.prod(shape)
    # Nominal figures of a small machine: a CPU's plan is for checking predictions, not for its roofline.
    cpu = Device("cpu", memory, 100e9, 100e9, 20e9, 10e9)
    return Target(name, cpu, shape, tuple(devices[: math.prod(shape)]))


def _tpu(name: str, kind: str, shape: tuple[int, ...]) -> list[Any]:
    device = DEVICES[kind]
    shapes = _SHAPES[kind].split()
    legal_size = len(shape) == device.torus_dims and math.prod(shape) <= device.max_chips
    sorted_name = "x".join(str(d) for d in sorted(shape))
    listed = sorted_name in {"x".join(str(d) for d in sorted(int(v) for v in s.split("x"))) for s in shapes}
    cubes = device.torus_dims == 3 and all(d % 4 == 0 for d in shape)
    if not legal_size or not (listed or cubes):
        cube = ", or any multiple of 4x4x4" if device.torus_dims == 3 else ""
        raise ConfigError(f"--topology = {name!r}: {kind} slices are {', '.join(shapes)}{cube}")
    _need("libtpu", name, "plan")
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    topology = f"{device.compiler_name or kind}:{'x'.join(map(str, shape))}"
    return _describe("tpu", topology, options)


def _gpu(name: str, kind: str, shape: tuple[int, ...]) -> list[Any]:
    *hosts, devices = shape
    if len(hosts) > 1 or devices > 8:
        raise ConfigError(f"--topology = {name!r}: {kind} takes N or HOSTSxN with 1 to 8 devices a host, as {kind}:8")
    _need("jax_cuda12_plugin", name, "plan-gpu")
    description = importlib.resources.files("sympow_jax.planning") / "topologies" / f"{kind}.txtpb"
    options = {"target_config": description.read_text(), "topology": f"1x{hosts[0] if hosts else 1}x{devices}"}
    return _describe("cuda", kind, options)


def _need(module: str, name: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--topology = {name!r}: needs {module}, the compiler for this hardware; install the extra {extra!r}: "
            f"pip install 'sympow_jax[{extra}]'"
        )


COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-pjrt", "cpu": "jaxlib"}


def compiler(platform: str) -> str:
    """The package that compiles for a platform, and its version."""
    package = COMPILERS[platform]
    return f"{package} {_version(package)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a nightly, or one that came with the machine


def mismatch(platform: str) -> str:
    """What to install if libtpu is not of the release that this jax was made with; "" if it is, or for others."""
    installed = _version(COMPILERS[platform])
    if platform != "tpu" or installed == "unknown":
        return ""
    text = " ".join(importlib.metadata.requires("jax") or [])
    wanted = re.search(r"libtpu==([\d.]+)\.\*", text)
    if wanted is None or installed.startswith(wanted[1] + ".") or installed == wanted[1]:
        return ""
    return (
        f"libtpu {installed} is not the {wanted[1]}.* that jax {jax.__version__} is made for: "
        f"pip install 'jax[tpu]=={jax.__version__}'"
    )


@functools.cache
def _description(platform: str, topology: str, options: tuple[tuple[str, Any], ...]) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, platform, **dict(options))


def _describe(platform: str, topology: str, options: dict[str, Any]) -> list[Any]:
    return list(_description(platform, topology, tuple(sorted(options.items()))).devices)
