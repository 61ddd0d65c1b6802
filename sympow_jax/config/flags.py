"""From a command line to a configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax import variants
from sympow_jax.config.errors import ConfigError, nearest, require, require_known
from sympow_jax.config.exchange import NEW_PARAMETERS, is_workdir, workdir_values
from sympow_jax.config.files import load_file, load_values, takes_variant
from sympow_jax.config.reduce import KEY, reduce_values
from sympow_jax.config.resolve import resolve
from sympow_jax.config.schema import Config
from sympow_jax.config.values import check_numbers, flatten, parse_value


def parse_flags(argv: Sequence[str]) -> Config:
    """`--config=FILE[:ARG]`, or `WORKDIR[:VARIANT]`, and `--config.a.b=v ...` -> Config; anything else is an error.

    `--config.reduce=N` is a config file at an N-th of its size (see reduce.py), to which the other flags apply.
    """
    path, arg = _named(argv)
    values = workdir_values(path, arg) if is_workdir(path) else _file_values(path, arg)
    types = flatten(load_values("default").to_dict())  # a file may have a value of another type, () or None
    known = [key for key in flatten(values.to_dict()) if key in types]
    reduced = [flag for flag in argv if flag.partition("=")[0] == f"--config.{KEY}"]
    for flag in reduced[-1:]:
        require(not is_workdir(path), f"{flag}: is for config files; {path} is a workdir, whose sizes its weights have")
        reduce_values(values, flag.partition("=")[2])
    for flag in argv:
        name = flag.removeprefix("--").partition("=")[0]
        if name != "config" and flag not in reduced:
            require(name.startswith("config."), f"--{name}: no such flag{nearest(name, ['config', 'workdir'])}")
            key = name.removeprefix("config.")
            require_known(f"--{name}: no such key", key, known)
            require(key != "variant" or not is_workdir(path), f"{flag}: {path} has its layers already; {_EXCHANGE}")
            node: Any = values
            *parents, leaf = key.split(".")
            for parent in parents:
                node = node[parent]
            require("=" in flag, f"--{name}: no value; write --{name}=VALUE")
            with node.ignore_type():
                node[leaf] = parse_value(flag.partition("=")[2], types[key], key)
    return resolve(values)


_EXCHANGE = "write --config=WORKDIR:VARIANT to exchange its attention"
INIT_FLAGS = ("init_from", "init_from_allow")


def initial_weights_flags(flags: Mapping[str, str], argv: Sequence[str]) -> tuple[str, str]:
    """The values of INIT_FLAGS; with --config=WORKDIR:VARIANT, what only the variant has may start anew."""
    init_from, allow = (flags.get(name, "") for name in INIT_FLAGS)
    require(
        bool(init_from or not allow),
        f"--init_from_allow = {allow!r}: there is no --init_from, whose folder has the others; give both, or neither",
    )
    if init_from and is_workdir(_named(argv)[0]):
        allow = ",".join([*NEW_PARAMETERS, *filter(None, [allow])])
    return init_from, allow


def _named(argv: Sequence[str]) -> tuple[str, str]:
    named = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    require(bool(named), "--config is missing: use --config=configs/quickstart.py[:VARIANT]; --list shows them")
    for path, _, arg in ((named[-1], "", ""), named[-1].rpartition(":")):
        if path and is_workdir(path):  # whose name may have colons
            return path, arg
    path, _, arg = named[-1].partition(":")
    return path, arg


def _file_values(path: str, arg: str) -> Any:
    if arg and arg not in variants.VARIANTS and takes_variant(path):
        hint = nearest(arg, list(variants.VARIANTS))
        raise ConfigError(f"--config = '{path}:{arg}': no variant {arg!r}{hint}")
    return load_values(path, arg)


def parse_variants(text: str, seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """[(variant, seed)] of "all" or "a,b:0+1", in the order given; a variant named after "all" has seeds of its own."""
    runs: dict[str, tuple[int, ...]] = {}
    items = [item.strip().partition(":") for item in text.split(",")]
    names = [name for name, _, _ in items]
    for name, _, own in items:
        if name not in (*variants.VARIANTS, "all"):
            raise ConfigError(f"--variants: no variant {name!r}{nearest(name, list(variants.VARIANTS))}")
        require(names.count(name) == 1, f"--variants = {text}: {name} is there twice; its seeds go as {name}:0+1")
        chosen = parse_value(own.replace("+", ","), (0,), "--variants") if own else seeds
        check_numbers(f"--variants: seeds of {name}", chosen, least=0)
        runs |= {variant: chosen for variant in (variants.VARIANTS if name == "all" else [name])}
    return [(variant, seed) for variant, chosen in runs.items() for seed in chosen]


def parse_points(text: str, seeds: tuple[int, ...], paths: Sequence[str]) -> list[tuple[str, int]]:
    """[(argument, seed)] of "A;B", arguments of the config file `paths[-1]`, or of "all", those in its tuple POINTS."""
    require(bool(paths), "--config is missing: --points are arguments of a config file")
    known = tuple(getattr(load_file(paths[-1]), "POINTS", ()))
    require(bool(known), f"--points = {text!r}: {paths[-1]} has no tuple POINTS; sweep it by --variants")
    points = known if text == "all" else tuple(text.split(";"))
    for point in points:
        if point not in known:
            raise ConfigError(f"--points: no point {point!r}{nearest(point, known)}; they are separated by ';'")
        require(points.count(point) == 1, f"--points = {text}: {point} is there twice")
    return [(point, seed) for point in points for seed in seeds]
