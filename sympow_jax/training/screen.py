"""The first screen of a run: what is about to be trained, on what, from where."""

import jax
from rich.console import Console
from rich.table import Table

from sympow_jax.config import Config
from sympow_jax.models import flops
from sympow_jax.training.data import RunData
from sympow_jax.typing import PyTree


def parameter_table(params: PyTree) -> Table:
    """Parameters by module, with shapes and counts."""
    table = Table(title="Parameters", title_justify="left")
    for column in ("name", "shape", "dtype"):
        table.add_column(column)
    table.add_column("count", justify="right")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        table.add_row(name, str(leaf.shape), str(leaf.dtype), f"{leaf.size:,}")
    table.add_row("total", "", "", f"{num_parameters(params):,}", end_section=True)
    return table


def num_parameters(params: PyTree) -> int:
    """All numbers in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def print_first_screen(config: Config, params: PyTree, data: RunData, first_step: int, workdir: str) -> None:
    """One block: model, data, work per step, device, and where the run starts."""
    d, a = config.data, config.attention
    attention, rest = flops.train_flops_per_token(config, params, d.seq_len)
    tokens = d.batch_size * d.seq_len
    start = f"continues from step {first_step}" if first_step else "new run"
    lines = {
        "run": f"{workdir} ({start}), {config.num_train_steps:,} steps, seed {config.seed}",
        "variant": f"{config.variant}: kernel {a.kernel}, position {a.position}, gate {a.gate}, {a.implementation}",
        "model": f"{num_parameters(params):,} parameters, {config.model.num_layers} layers of {config.model.embed_dim}",
        "tokens": f"{tokens:,} a step, {tokens * config.num_train_steps:,} in all, "
        f"{data.train.epoch(config.num_train_steps):.2f} epochs of {d.train}",
        "training FLOPs": f"{attention + rest:.3g} a token: {attention:.3g} attention, {rest:.3g} the rest",
        "corpus": data.describe()["train_digest"],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {config.model.dtype}",
    }
    table = Table(show_header=False, box=None)
    for name, text in lines.items():
        table.add_row(name, text)
    Console().print(table)
