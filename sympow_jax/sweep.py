"""Trains and evaluates several variants and seeds, and writes one table and one plot.

    python -m sympow_jax.sweep --config=configs/quickstart.py --variants=softmax_rope:0+1,sympow,fox --root=DIR
                               [--seeds=0] [--lengths=...] [--learning_rates=1e-3,3e-3,1e-2]
                               [--init_from=WORKDIR[:STEP]] [--config.a.b=value ...] [--tables]
    python -m sympow_jax.sweep --config=configs/figures/state_recall.py --points=all --seeds=0,1,2 --root=DIR

`--config=WORKDIR --init_from=WORKDIR` exchanges the attention of a trained model for each variant (docs/retrofit.md).
`--variants=all` is every row of the variants table; `NAME:0+1` gives one variant its own seeds. `--points=A;B` are
arguments of the config file, `all` those of its tuple POINTS. With `--learning_rates` the first seed of a variant is
trained at each, and the one with the lowest held-out loss at the trained length, at the last step, is that of all its
seeds; ROOT/learning_rates.json has the losses. A run on a task is asked that task at its own length. Each run lives
in ROOT/VARIANT[-lrRATE]-seedN and is an ordinary workdir: the same command goes on after a kill where it stopped.
`--tables` runs nothing: table and plot are of the runs that are evaluated.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax import config as config_lib
from sympow_jax.command_line import flag_value, run_program, split_flags, use_compilation_cache
from sympow_jax.config import TASKS, Config, ConfigError, parse_points, parse_variants
from sympow_jax.evals.result_shape import OF_A_RUN, RETRIEVAL, read_result
from sympow_jax.evaluate import evaluate, is_current
from sympow_jax.evaluation_request import DEPTHS, LENGTH_GENERALISATION, NUM_EXAMPLES, EvaluationRequest, lengths_of
from sympow_jax.files import json_sha256, read_json, write_json_atomic, write_text_atomic
from sympow_jax.models.cost import stream_cost
from sympow_jax.plots import style
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from sympow_jax.plots.state_recall import recall_figure
from sympow_jax.plots.sweep_tables import pooled, recall_table, runs_table, variants_table
from sympow_jax.training import run_files
from sympow_jax.training.bad_steps import BadStepsError
from sympow_jax.training.cpu_devices import use_cpu_devices
from sympow_jax.training.initial_weights import check_source
from sympow_jax.training.loop import train
from sympow_jax.training.metrics import METRICS_NAME, read_metrics

RATES_NAME = "learning_rates.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its name (a variant, or an argument of the config), config and folder."""

    name: str
    config: Config
    workdir: pathlib.Path
    rates_tried: tuple[float, ...] = ()

    @property
    def task(self) -> str:
        """What it is evaluated on."""
        return self.config.data.heldout if self.config.data.heldout in TASKS else LENGTH_GENERALISATION


def run_one(run: Run, lengths: Sequence[int], initial: tuple[str, str] = ("", "")) -> int:
    """Trains to the end and evaluates, or does what of it is missing."""
    config, workdir = run.config, str(run.workdir)
    request = EvaluationRequest(
        workdir=workdir,
        task=run.task,
        lengths=tuple(lengths),
        data=config.data.heldout,
        name=run.task,
        step=config.num_train_steps,
        num_documents=config.evaluation.num_documents,
        num_examples=NUM_EXAMPLES.get(run.task, 0),
        pairs=(config.task.num_pairs,),
        depths=DEPTHS,
    )
    if is_current(request, run_files.resolve_for(config, workdir)):
        run_files.check_resume(run_files.resolve_for(config, workdir), workdir)
        check_source(initial[0], workdir, has_checkpoints=True)
        return 0
    code = train(config, workdir, init_from=initial[0], init_from_allow=initial[1])
    if code == 0:
        evaluate(request)
    return code


def choose_rate(
    name: str, config: Config, root: pathlib.Path, rates: Sequence[float], initial: tuple[str, str]
) -> tuple[float, int]:
    """The rate with the lowest held-out loss at the last step, training what is missing; and an exit code.

    What was chosen stands in ROOT/learning_rates.json with the losses, and is chosen again only for another config.
    """
    path = root / RATES_NAME
    kept = read_json(path) if path.exists() else {}
    made_from = json_sha256({**dataclasses.asdict(config), "rates": list(rates), **_started_from(initial)})
    if kept.get(name, {}).get("made_from") == made_from:
        return kept[name]["chosen"], 0
    losses = {}
    for rate in rates:
        run = at_rate(name, config, root, rate)
        print(f"sweep: {name} at a learning rate of {rate:g}, {run.workdir}", flush=True)
        try:
            code = train(run.config, str(run.workdir), init_from=initial[0], init_from_allow=initial[1])
        except BadStepsError as error:
            print(f"sweep: {name} diverged at a learning rate of {rate:g}: {error}", flush=True)
            losses[rate] = None
            continue
        if code:
            return rate, code
        losses[rate] = _heldout_loss(run)
    if all(loss is None for loss in losses.values()):
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise ConfigError(f"--learning_rates = {tried}: {name} has no finite held-out loss at any; try lower ones")
    chosen = min(losses, key=lambda rate: math.inf if losses[rate] is None else losses[rate])
    found = {"chosen": chosen, "seed": config.seed, "heldout_loss": {f"{rate:g}": losses[rate] for rate in rates}}
    kept = read_json(path) if path.exists() else {}  # another sweep may have written in these hours
    write_json_atomic(path, kept | {name: found | {"steps": config.num_train_steps, "made_from": made_from}})
    return chosen, 0


def _started_from(initial: tuple[str, str]) -> dict[str, Any]:
    return {"initial": list(initial)} if initial[0] else {}


def at_rate(name: str, config: Config, root: pathlib.Path, rate: float, rates: Sequence[float] = ()) -> Run:
    """The run at a learning rate."""
    changed = config_lib.override(config, {"optimizer.learning_rate": rate})
    return Run(name, changed, root / f"{_folder(name)}-lr{rate:g}-seed{config.seed}", tuple(rates))


def _heldout_loss(run: Run) -> float | None:
    """Of the last step, at the trained length; None where it is not finite."""
    rows = read_metrics(run.workdir / METRICS_NAME)
    last = [row for row in rows if row["step"] == run.config.num_train_steps and "heldout_loss" in row]
    return last[-1]["heldout_loss"] if last else None


def write_summary(root: pathlib.Path, runs: Sequence[Run]) -> None:
    """ROOT/sweep.md, sweep.json and sweep.png of the runs that are evaluated."""
    results = [result for run in runs if (result := _result(run)) is not None]
    if not results:
        return
    if "same_target" in results[0]:
        text = variants_table(results) + "\n" + runs_table(results)
        figure = length_generalisation_figure(pooled(results))
    else:
        text, figure = recall_table(results), recall_figure(results)
    write_text_atomic(root / "sweep.md", text)
    write_json_atomic(root / "sweep.json", results)
    style.save(figure, root / "sweep.png")


def _result(run: Run) -> dict[str, Any] | None:
    """What was measured of a run, by its name in the sweep, with what the tables say of it besides."""
    file = _result_file(run)
    if not file.exists():
        return None
    chosen = {"learning_rate": run.config.optimizer.learning_rate, "rates_tried": list(run.rates_tried)}
    more: dict[str, Any] = chosen if run.rates_tried else {}
    if run.task == LENGTH_GENERALISATION:
        return read_result(file, OF_A_RUN) | {"variant": run.name} | more
    cost = stream_cost(run.config, run_files.load_vocab_size(str(run.workdir)), run.config.data.seq_len) or {}
    more |= {"name": run.name, "seed": run.config.seed, "state_bytes": cost.get("state_bytes")}
    return read_result(file, RETRIEVAL) | more


def _named_runs(own: Mapping[str, str], rest: Sequence[str]) -> tuple[list[tuple[str, int]], list[Config]]:
    """Names with their seeds, and the config of each."""
    if "root" not in own or ("variants" in own) == ("points" in own):
        missing = "root" if "root" not in own else "variants"
        raise ConfigError(f"--{missing} is missing, or --points beside it; see python -m sympow_jax.sweep in README.md")
    seeds = flag_value(own, "seeds", (0,), least=0)
    paths = [flag.partition("=")[2] for flag in rest if flag.startswith("--config=")]
    names = parse_variants(own["variants"], seeds) if "variants" in own else parse_points(own["points"], seeds, paths)
    changes = [flag for flag in rest if not flag.startswith("--config=")]
    configs = [
        config_lib.parse_flags([*(f"--config={path}:{name}" for path in paths), *changes, f"--config.seed={seed}"])
        for name, seed in names
    ]
    return names, configs


def _lengths(own: Mapping[str, str], run: Run) -> tuple[int, ...]:
    """Those of --lengths or of the config; of a task at least its own."""
    lengths, trained = flag_value(own, "lengths", lengths_of(run.config, run.task), least=1), run.config.data.seq_len
    return (trained,) if run.task != LENGTH_GENERALISATION and trained not in lengths else lengths


def _check_equal_contexts(own: Mapping[str, str], names: Sequence[tuple[str, int]], configs: Sequence[Config]) -> None:
    """Raises ConfigError for points whose losses would stand in one table under other contexts."""
    runs = [Run(name, config, pathlib.Path()) for (name, _), config in zip(names, configs, strict=True)]
    read = {
        run.name: (run.config.data.seq_len, _lengths(own, run)) for run in runs if run.task == LENGTH_GENERALISATION
    }
    first = next(iter(read), "")
    for name, contexts in read.items():
        if contexts != read[first]:
            (trained, lengths), (trained_first, lengths_first) = contexts, read[first]
            raise ConfigError(
                f"--points: {name!r} is trained at {trained} tokens and read at {lengths}, {first!r} at "
                f"{trained_first} and {lengths_first}; one table needs equal contexts, so sweep them apart"
            )


def use_devices_of_all(configs: Sequence[Config]) -> None:
    """As many devices of the CPU as mesh.cpu_devices names, one where it names none: the runs share this process.

    Raises:
      ConfigError: points that name unlike numbers, or the environment names one too.
    """
    named = {config.mesh.cpu_devices for config in configs}
    if len(named) > 1:
        numbers = " and ".join(map(str, sorted(named)))
        raise ConfigError(f"mesh.cpu_devices = {numbers}: the runs of a sweep share one process; give all one number")
    if named != {-1}:
        use_cpu_devices(configs[0])


def run(argv: Sequence[str]) -> int:
    """Runs the sweep that the flags name; returns the exit code."""
    known = ("variants", "points", "seeds", "root", "lengths", "learning_rates", *config_lib.INIT_FLAGS)
    own, rest = split_flags(argv, known, switches=("tables",), prefix="config")
    names, configs = _named_runs(own, rest)
    _check_equal_contexts(own, names, configs)
    rates = flag_value(own, "learning_rates", (0.0,), least=0) if "learning_rates" in own else ()
    root, initial = pathlib.Path(own["root"]), config_lib.initial_weights_flags(own, rest)
    if "tables" in own:
        return _write_tables(own, names, configs, root, rates)
    use_devices_of_all(configs)
    use_compilation_cache()
    runs: list[Run] = []
    chosen: dict[str, float] = {}
    for (name, _), config in zip(names, configs, strict=True):
        if rates and name not in chosen:
            chosen[name], code = choose_rate(name, config, root, rates, initial)
            if code:
                return code
        runs.append(_run_of(name, config, root, chosen.get(name), rates))
        print(f"sweep: run {len(runs)} of {len(names)}, {runs[-1].workdir}", flush=True)
        code = run_one(runs[-1], _lengths(own, runs[-1]), initial)
        if code:
            return code
        write_summary(root, runs)
    print(f"sweep: table {root / 'sweep.md'}, plot {root / 'sweep.png'}")
    return 0


def _run_of(name: str, config: Config, root: pathlib.Path, rate: float | None, rates: Sequence[float]) -> Run:
    """The run of a name and seed, at the rate that was chosen of `rates` where there are any."""
    if rate is not None:
        return at_rate(name, config, root, rate, rates)
    return Run(name, config, root / f"{_folder(name)}-seed{config.seed}")


def _write_tables(
    own: Mapping[str, str],
    names: Sequence[tuple[str, int]],
    configs: Sequence[Config],
    root: pathlib.Path,
    rates: Sequence[float],
) -> int:
    """`write_summary` of those runs of the sweep that are evaluated."""
    kept = read_json(root / RATES_NAME) if rates and (root / RATES_NAME).exists() else {}
    chosen = {name: kept.get(name, {}).get("chosen") for name, _ in names}
    runs = [
        _run_of(name, config, root, chosen[name], rates)
        for (name, _), config in zip(names, configs, strict=True)
        if not rates or chosen[name] is not None
    ]
    runs = [run for run in runs if _is_evaluated(run, _lengths(own, run))]
    if not runs:
        raise ConfigError(f"--tables: no run of this sweep in --root = {root} is evaluated; leave it out to run them")
    write_summary(root, runs)
    print(f"sweep: table {root / 'sweep.md'}, plot {root / 'sweep.png'}, of {len(runs)} of {len(names)} runs")
    return 0


def _is_evaluated(run: Run, lengths: Sequence[int]) -> bool:
    """Whether the run's result is of its last step and of these lengths; whether of the same data, nobody asks."""
    file = _result_file(run)
    made_from = read_json(file).get("inputs") if file.exists() else None
    if not isinstance(made_from, dict):
        return False
    return made_from.get("step") == run.config.num_train_steps and made_from.get("lengths") == sorted(lengths)


def _result_file(run: Run) -> pathlib.Path:
    return run.workdir / "eval" / f"{run.task}.json"


def _folder(name: str) -> str:
    return name.replace(",", "-").replace("=", "")


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
