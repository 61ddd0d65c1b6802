"""The first screen of a run: what is about to be trained, on what, from where."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console, Group
from rich.table import Table

from sympow_jax import config as config_lib
from sympow_jax.config import Config, describe_layers
from sympow_jax.models import flops
from sympow_jax.training.data import RunData
from sympow_jax.typing import PyTree


def parameter_table(params: PyTree) -> Table:
    """Parameters one by one, with shapes and counts."""
    table = Table(title="Parameters", title_justify="left")
    for column in ("name", "shape", "dtype"):
        table.add_column(column)
    table.add_column("count", justify="right")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        table.add_row(name, str(leaf.shape), str(leaf.dtype), f"{leaf.size:,}")
    table.add_row("total", "", "", f"{num_parameters(params):,}", end_section=True)
    return table


def module_table(params: PyTree) -> Table:
    """Parameters by module: the parts of a layer (times its layers), embeddings, norms."""
    total, modules = num_parameters(params), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path[:-1]] or [path[0].key]
        stacked = names[0].startswith("blocks_")
        module = "/".join(names[:3] if stacked and names[1:2] == ["mixer"] else names[:2])
        count, _ = modules.get(module, (0, ""))
        modules[module] = (count + leaf.size, f"{leaf.shape[0]} x" if stacked else "")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("module", "layers", "parameters", "share"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for module, (count, layers) in modules.items():
        table.add_row(module, layers, f"{count:,}", f"{count / total:.1%}")
    table.add_row("total", "", f"{total:,}", "")
    return table


def num_parameters(params: PyTree) -> int:
    """All numbers in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def config_changes(config: Config) -> Iterable[str]:
    """`key = value (default)` for each key that differs from configs/default.py with the same variant."""
    defaults = config_lib.resolve(config_lib.load_values("default", config.variant))
    changes: dict[str, tuple[Any, Any]] = config_lib.diff(defaults, config)
    return [f"{path} = {new!r} ({old!r})" for path, (old, new) in changes.items()]


def mesh_line(mesh: Mesh) -> str:
    """Sizes of the axes that split anything, and the devices."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{axes or 'one device'}: {mesh.size} x {mesh.devices.flat[0].device_kind}"


def print_first_screen(
    config: Config, params: PyTree, data: RunData, mesh: Mesh, first_step: int, workdir: str
) -> None:
    """One block: what differs from the defaults, model, data, work per step, mesh, and where the run starts."""
    d = config.data
    attention, rest = flops.train_flops_per_token(config, params, d.seq_len)
    tokens = d.batch_size * d.seq_len
    lines = {
        "run": f"{workdir}, {config.num_train_steps:,} steps, seed {config.seed}",
        "checkpoint": f"step {first_step:,} found, continues from it" if first_step else "none, a new run",
        "config": "\n".join(config_changes(config)) or "as configs/default.py",
        "variant": f"{config.variant}: {describe_layers(config)}, {config.attention.implementation}",
        "tokens": f"{tokens:,} a step, {tokens * config.num_train_steps:,} in all, "
        f"{data.train.epoch(config.num_train_steps):.2f} epochs of {d.train}",
        "training FLOPs": f"{attention + rest:.3g} a token: {attention:.3g} attention, {rest:.3g} the rest",
        "corpus": data.describe()["train_digest"],
        "mesh": f"{mesh_line(mesh)}, {config.model.dtype}",
    }
    table = Table(show_header=False, box=None)
    for name, text in lines.items():
        table.add_row(name, text)
    Console(markup=False, highlight=False).print(Group(table, module_table(params)))
