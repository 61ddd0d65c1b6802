"""What a run needs of hardware that is not there: compiles its real train and eval step for it, and reports.

    python -m sympow_jax.plan --config=configs/NAME.py[:ARG] --topology=v5e:4x4 [--config.a.b=value ...]
    python -m sympow_jax.plan --config=... --topology=v5e:4x4 --topology=h100:8 --variants=all --output=FOLDER/NAME
    python -m sympow_jax.plan --config=... --topology=v5p:4x4x4 --fit [--max_compiles=12]
    python -m sympow_jax.plan --list

--programs=FOLDER keeps compiled programs and does not compile them again; --kernels adds the static schedules of TPU
kernels, whose time then counts. --evaluate plans eval.py instead: memory at each of evaluation.lengths.
Repeat --config and --topology, or name --variants=a,b,c (or all), for one matrix of all of them. --output=NAME writes
NAME.json, and NAME.md for more than one plan. mesh.* that is left alone is chosen: rows of the batch over `data`, what
is left over `seq`; for linear kernels in a quadratic form, over `tensor`. --fit chooses that, remat, accumulation and
chunk size among what no --config.* flag gives.
Nothing runs on the hardware: figures are the compiler's, and times are bounds that no run can beat.
"""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from sympow_jax import config as config_lib
from sympow_jax.command_line import flag_value, run_program, split_flags
from sympow_jax.config import Config, ConfigError, parse_variants
from sympow_jax.files import FileError, read_json, write_text_atomic
from sympow_jax.planning import evaluation, fit, report, targets
from sympow_jax.planning.errors import PlanError
from sympow_jax.training.data import vocabulary


def parse_configs(flags: Sequence[str], variants: str) -> list[Config]:
    """One config for each --config flag, or for each of them and each variant; other flags apply to all."""
    named = [flag for flag in flags if flag.startswith("--config=")]
    changes = [flag for flag in flags if not flag.startswith("--config=")]
    if not named:
        config_lib.parse_flags([])  # says what is missing
    names = [name for name, _ in parse_variants(variants, (0,))] if variants else []
    chosen = [[f"--config.variant={name}"] for name in names] or [[]]
    return [config_lib.parse_flags([flag, *changes, *variant]) for flag in named for variant in chosen]


def _prepare_compilers() -> None:
    """This process needs only its CPU, and the compilers need not look for the hardware that they compile for."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_traceback_in_locations_limit", 0)  # kept programs are found again after a line moved
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", **quiet}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # an absent GPU driver is no error here


def run(argv: Sequence[str]) -> int:
    """Plans what the flags name; returns 0 if something fits, 2 if nothing does, 1 if one of several is in error."""
    if "--list" in argv:
        print("\n".join(targets.legal()))
        return 0
    topologies = [flag.partition("=")[2] for flag in argv if flag.startswith("--topology=")]
    known = ("topology", "output", "variants", "max_compiles", "programs")
    own, rest = split_flags(argv, known, switches=("fit", "kernels", "evaluate"), prefix="config")
    if not topologies:
        raise ConfigError("--topology is missing: for example --topology=v5e:4x4 or h100:8; --list names them all")
    configs = parse_configs(rest, own.get("variants", ""))
    given = {flag.removeprefix("--config.").partition("=")[0] for flag in rest if flag.startswith("--config.")}
    max_compiles = flag_value(own, "max_compiles", 12, least=1)
    _check_together(own)
    _check_replaceable(own)
    _prepare_compilers()
    plans = []
    for target in [targets.find(name) for name in topologies]:
        for config in configs:
            try:
                plans += _plans(config, target, own, given, max_compiles)
            except ConfigError as error:
                if len(topologies) * len(configs) == 1:
                    raise
                print(f"error: {config.variant} for {target.name}: {error}", file=sys.stderr, flush=True)
                plans.append(report.failure(config, target, PlanError("config", str(error))))
            _write(own, plans)  # after each: the next may take an hour
    if len(plans) > 1 and "evaluate" not in own:
        print(report.matrix(plans), end="")
    if any(p["status"] == "config error" for p in plans):
        return 1
    return 0 if any(p["status"] == "fits" for p in plans) else 2


def _plans(
    config: Config, target: targets.Target, own: dict[str, str], given: set[str], max_compiles: int
) -> list[report.Plan]:
    """Makes and prints the plan of one config for one target, or with --fit those that a search finds."""
    folder = pathlib.Path(own["programs"]) if "programs" in own else None
    vocab_size, kernels = vocabulary(config), "kernels" in own
    if "fit" in own:
        options = {"max_compiles": max_compiles, "folder": folder, "given": given, "kernels": kernels}
        return _search(config, vocab_size, target, **options)
    if not any(key.startswith("mesh.") and key != "mesh.cpu_devices" for key in given):
        config = fit.with_default_mesh(config, target)
    if "evaluate" in own:
        plan = evaluation.plan_evaluation(config, vocab_size, target, folder)
    else:
        plan = fit.try_plan(config, vocab_size, target, folder, kernels=kernels)
    Console(markup=False).print(evaluation.evaluation_table(plan) if "evaluate" in own else report.table(plan))
    return [plan]


def _search(config: Config, vocab_size: int, target: targets.Target, **options: Any) -> list[report.Plan]:
    """Prints what `fit.search` finds with its `options`."""
    told = []

    def tell(text: str) -> None:
        told.append(text)
        print(text, flush=True)

    found = fit.search(config, vocab_size, target, tell=tell, **options)
    if not found:
        print(f"{config.variant} for {target.name}: {_in_vain(len(told), options['max_compiles'])}")
    for rank, (changes, result) in enumerate(found, start=1):
        seconds = result["roofline"]["step_seconds"]
        changed = fit.flags(config, changes) or "as configured"
        print(f"{rank}. {seconds:.3g} s a step at best: {changed}", flush=True)
    return [result for _, result in found]


def _in_vain(compiled: int, max_compiles: int) -> str:
    if not compiled:
        return "no mesh, remat and accumulation are legal with these flags; without --fit the plan says why"
    more = f", or --max_compiles above {max_compiles}" if compiled == max_compiles else ""
    return f"nothing fits of {compiled} compiled; try a larger slice{more}"


def _check_together(own: dict[str, str]) -> None:
    """Raises ConfigError for a flag beside --evaluate that is for plans of training."""
    for name in ("fit", "kernels"):
        if name in own and "evaluate" in own:
            raise ConfigError(f"--{name} --evaluate: --{name} is for plans of training; leave one of the two out")


def _check_replaceable(own: dict[str, str]) -> None:
    """Raises ConfigError for --output over a file that holds no plans: something else, such as a config.json."""
    path = pathlib.Path(own.get("output", "").removesuffix(".json") + ".json")
    if "output" not in own or not path.exists():
        return
    try:
        plans = read_json(path, kind=list)
    except FileError:
        plans = [{}]
    if not all(isinstance(plan, dict) and "compiled_for" in plan for plan in plans):
        raise ConfigError(f"--output = {own['output']!r}: {path} is there and holds no plans; give another name")


def _write(own: dict[str, str], plans: Sequence[report.Plan]) -> None:
    """--output: NAME.json, and NAME.md with the matrix."""
    if "output" not in own:
        return
    path = pathlib.Path(own["output"].removesuffix(".json"))
    write_text_atomic(path.with_name(path.name + ".json"), json.dumps(plans, indent=1) + "\n")
    if len(plans) > 1 and "evaluate" not in own:
        write_text_atomic(path.with_name(path.name + ".md"), report.matrix(plans))


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
