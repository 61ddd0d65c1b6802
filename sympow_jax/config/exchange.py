"""--config=WORKDIR[:VARIANT]: the configuration of a workdir, its attention exchanged for a row of the variants table.

Everything else is the workdir's: model, data, optimizer, the options of attention that a row does not choose. What the
old attention had and the new one cannot use (a scaling of rope under learned_rope, say) is refused by the checks of
the configuration, and is set on the command line.
"""

import dataclasses
import pathlib
from typing import Any

from sympow_jax import variants
from sympow_jax.config.absent import resolve_saved
from sympow_jax.config.errors import ConfigError, require_known
from sympow_jax.config.files import as_values, config_names
from sympow_jax.config.schema import AttentionConfig, Config
from sympow_jax.files import inside, read_json

NEW_PARAMETERS = (
    "layers/*/mixer/gate/*", "layers/*/mixer/gate_logits", "layers/*/mixer/beta*/*",
    "layers/*/mixer/bias_parameters/*", "shared_bias/*",
)  # fmt: skip
"""Names of what an exchanged attention may have and the old one lacked; it starts anew under --init_from."""


def is_workdir(name: str) -> bool:
    """Whether --config=NAME[:ARG] is a folder, not a config file."""
    return pathlib.Path(name).is_dir() and name not in config_names()


def workdir_values(workdir: str, variant: str = "") -> Any:
    """The values of WORKDIR:VARIANT, or of WORKDIR as it is; what was chosen for its machine is chosen anew.

    A data gate of a linear kernel starts log-spaced per head (gate_init = timescales): old keys, which softmax could
    ignore, fade from the start. attention.blend_from is the row that the old attention was.

    Raises:
      ConfigError, FileError: no workdir, no such variant; one line.
    """
    where = f"--config = {workdir!r}"
    if not (pathlib.Path(workdir) / "config.json").is_file():
        raise ConfigError(f"{where}: has no config.json; name the workdir of a run or of an import, or a config file")
    try:
        old = resolve_saved(read_json(inside(workdir, "config.json")))
    except ConfigError as error:
        raise ConfigError(f"{workdir}/config.json: {error}") from None
    attention, position = dataclasses.replace(old.attention, implementation="auto", chunk_size=0), old.position
    if variant:
        require_known(f"{where}: no variant {variant!r}", variant, list(variants.VARIANTS))
        attention = _exchange(old, attention, variants.VARIANTS[variant])
        position = dataclasses.replace(position, rotation="variant")
    parts = {"attention": attention, "position": position}
    mesh = dataclasses.replace(old.mesh, cpu_devices=-1)
    new = dataclasses.replace(old, variant=variant or old.variant, mesh=mesh, **parts)
    return as_values(dataclasses.asdict(new))


def _exchange(old: Config, attention: AttentionConfig, row: variants.Variant) -> AttentionConfig:
    linear = row.kernel in variants.LINEAR_KERNELS
    return dataclasses.replace(
        attention,
        kernel=row.kernel,
        position=row.position,
        gate=row.gate,
        gate_init="timescales" if linear and row.gate == "data" else row.gate_init,
        layer_pattern=row.layer_pattern,
        blend_from=_row_of(old.attention),
        blend_steps=0,
    )


def _row_of(attention: AttentionConfig) -> str:
    """The row of BLENDABLE that all layers of the attention are, or "none"."""
    for name in variants.BLENDABLE:
        row = variants.VARIANTS[name]
        have = (attention.kernel, attention.position, attention.gate, {*attention.layer_pattern})
        if have == (row.kernel, row.position, row.gate, {*row.layer_pattern}):
            return name
    return "none"
