"""The command train.py: flags -> config -> one run (the script's docstring lists the flags).

JAX and all that stands on it are imported once the flags are right: an error of a flag, and --list, are there at once.
"""

from collections.abc import Sequence

from sympow_jax.command_line import PROCESS_FLAGS, joined_processes, run_program, split_flags, use_compilation_cache
from sympow_jax.config import INIT_FLAGS, ConfigError, config_names, initial_weights_flags, parse_flags
from sympow_jax.variants import VARIANTS

_SWITCHES = ("strict", "allow_learning_rate_change")
_KNOWN = ("workdir", *INIT_FLAGS, *PROCESS_FLAGS)


def run(argv: Sequence[str]) -> int:
    """Trains as the flags say; returns the exit code (training/signals.py documents them)."""
    if "--list" in argv:
        _print_list()
        return 0
    own, rest = split_flags(argv, _KNOWN, switches=_SWITCHES, prefix="config")
    config = parse_flags(rest)
    if "workdir" not in own:
        raise ConfigError("--workdir is missing: the folder of the run, for example --workdir=runs/first")

    from sympow_jax.training.cpu_devices import use_cpu_devices
    from sympow_jax.training.loop import train

    use_compilation_cache()
    switches = {name: name in own for name in _SWITCHES}
    with joined_processes(own, polls=True):
        use_cpu_devices(config)
        init_from, allow = initial_weights_flags(own, rest)
        return train(config, own["workdir"], init_from=init_from, init_from_allow=allow, **switches)


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Variants (--config=FILE.py:VARIANT)", title_justify="left")
    for column in ("variant", "kernel", "position", "gate", "layers", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "variant")
    for row in VARIANTS.values():
        table.add_row(row.name, row.kernel, row.position, row.gate, " ".join(row.layer_pattern), row.source)
    Console(markup=False).print(table)
    print("Configs:")
    for name, path in config_names().items():
        print(f"  {name:40} {path}")


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
