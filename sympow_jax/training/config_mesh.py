"""From a config to its mesh, with everything that the mesh must divide checked before anything is compiled."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import Config, ConfigError, layer_specs


def config_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config` asks for.

    Args:
      config: resolved configuration.
      devices: those of this run by default, or a topology's. A single process may leave some of them unused, by
        sizes whose product is smaller.

    Raises:
      ConfigError: in one line, sizes that do not fit the devices, or a dim that they do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes({axis: getattr(config.mesh, axis) for axis in sharding.AXES}, devices)
    _check_rows(config, sizes)
    check_model(config, sizes)
    _check_length(config, sizes)
    return make_mesh(sizes, devices)


def mesh_sizes(wanted: Mapping[str, int], devices: Sequence[Any]) -> dict[str, int]:
    """`wanted` with -1 replaced; a ConfigError where the sizes do not fit the devices, or leave some of a process."""
    try:
        sizes = sharding.infer_sizes(wanted, len(devices))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    used = math.prod(sizes.values())
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ConfigError(
            f"mesh: {_product(sizes, sharding.AXES)} = {used} of the {len(devices)} devices of several processes; "
            "use all of them, for example mesh.data = -1"
        )
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """The mesh of checked sizes; a ConfigError where the devices lie so that it cannot be made."""
    try:
        return sharding.make_mesh(sizes, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _product(sizes: dict[str, int], axes: Sequence[str]) -> str:
    return " x ".join(f"{axis} {sizes[axis]}" for axis in axes)


def _check_rows(config: Config, sizes: dict[str, int]) -> None:
    rows, parts = config.data.batch_size, config.optimizer.accumulation_steps
    devices = sizes["data"] * sizes["fsdp"]
    if rows % (devices * parts):
        more = -(-rows // (devices * parts)) * devices * parts
        raise ConfigError(
            f"data.batch_size = {rows}: must be a multiple of mesh {_product(sizes, sharding.BATCH)} times "
            f"optimizer.accumulation_steps = {parts}; use {more}, or a mesh with data x fsdp = "
            f"{math.gcd(rows // math.gcd(rows, parts), devices)}"
        )


def check_model(config: Config, sizes: dict[str, int]) -> None:
    """Raises ConfigError where the axes do not divide a dim of the model."""
    m, a = config.model, config.attention
    tensor, both = sizes["tensor"], sizes["fsdp"] * sizes["tensor"]
    dims = [
        ("model.num_kv_heads", m.num_kv_heads, tensor, "tensor"),
        ("model.embed_dim", m.embed_dim, both, "fsdp x tensor"),
    ]
    if m.mlp != "none":
        dims.append(("model.mlp_dim", m.mlp_dim, tensor, "tensor"))
    specs = layer_specs(config)
    if any(spec.mixer != "attention" for spec in specs):
        dims.append(("attention.conv_expand * model.embed_dim / 2", a.conv_expand * m.embed_dim // 2, tensor, "tensor"))
    for name, size, divisor, axes in dims:
        if size % divisor:
            raise ConfigError(
                f"{name} = {size}: must be a multiple of mesh {axes} = {divisor}; use {-(-size // divisor) * divisor}, "
                f"or mesh {axes} = {math.gcd(size, divisor)}"
            )


def _check_length(config: Config, sizes: dict[str, int]) -> None:
    a, length, shards, specs = config.attention, config.data.seq_len, sizes["seq"], layer_specs(config)
    pairs = any(not spec.streams_constant for spec in specs)
    halves = 2 if shards > 1 and pairs else 1  # where all pairs meet, a shard gets an early and a late half
    divisor = math.lcm(shards * sizes["tensor"], shards * halves)
    if length % divisor:
        raise ConfigError(
            f"data.seq_len = {length}: must be a multiple of {divisor} for mesh {_product(sizes, ('seq', 'tensor'))}; "
            f"use {-(-length // divisor) * divisor}"
        )
    taps = a.conv_width - 1
    if shards > 1 and any(spec.mixer != "attention" for spec in specs) and length // shards < taps:
        raise ConfigError(
            f"mesh.seq = {shards}: shards of {length // shards} tokens are shorter than the {taps} before them that "
            f"attention.conv_width = {a.conv_width} sees; use mesh.seq = {max(length // taps, 1)} or less"
        )
