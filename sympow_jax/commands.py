"""What train.py and eval.py do: flags -> config -> one library call, and errors as one line."""

import gc
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from sympow_jax import config as config_lib
from sympow_jax import retrieval
from sympow_jax.config import TASKS, Config, ConfigError, nearest
from sympow_jax.evals.files import write_json, write_result
from sympow_jax.evals.length_generalisation import length_generalisation, read_documents
from sympow_jax.evals.position_bias import distance_curves
from sympow_jax.host_memory import keep_freed_memory
from sympow_jax.input_pipeline.corpus import cache_folder
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.views import concat_view
from sympow_jax.loading import AT_EVALUATION, load_step
from sympow_jax.plots import style
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from sympow_jax.plots.position_bias import position_bias_figure
from sympow_jax.plots.tables import length_table, verdict
from sympow_jax.sharding import join_processes
from sympow_jax.training.bad_steps import BadStepsError
from sympow_jax.training.checkpoint import CheckpointError
from sympow_jax.training.loop import train
from sympow_jax.training.run_files import load_config
from sympow_jax.training.workdir import WorkdirError
from sympow_jax.variants import VARIANTS

LENGTH_GENERALISATION = "length_generalisation"
USER_ERRORS = (ConfigError, WorkdirError, CheckpointError, BadStepsError, ValueError, OSError)


def one_line_errors(run: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; an error that the user can mend becomes one line on standard error and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return run(argv)
    except USER_ERRORS as error:
        if os.environ.get("SYMPOW_JAX_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
    gc.collect()  # what the failed parts have still to say comes before the line that counts
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def run_program(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Exits with the code of `main`; after an error nothing that ends with the process prints past its one line."""
    keep_freed_memory()
    code = main(sys.argv[1:])
    if code == 1 and not os.environ.get("SYMPOW_JAX_TRACEBACK"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)


def split_flags(
    argv: Sequence[str], known: Sequence[str], *, switches: Sequence[str] = (), prefix: str = ""
) -> tuple[dict[str, str], list[str]]:
    """--name=value flags of `known` and bare --switches as a dict; the rest must start with --`prefix`."""
    values, rest = {}, []
    for flag in argv:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r}: expected --name=value{nearest(flag, known)}")
        if name in switches and not equals:
            values[name] = "true"
        elif name in known and equals:
            values[name] = value
        elif prefix and name.startswith(prefix):
            rest.append(flag)
        else:
            needs = f"--{name} needs a value: --{name}=VALUE" if name in known else f"--{name}: no such flag"
            raise ConfigError(needs + nearest(name, [*known, *switches]))
    return values, rest


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the user's cache folder (mode 0700: it holds executable content)."""
    import jax

    folder = cache_folder() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def train_main(argv: Sequence[str]) -> int:
    """train.py; returns the exit code (training/signals.py documents them)."""
    return one_line_errors(_train, argv)


def _train(argv: Sequence[str]) -> int:
    if "--list" in argv:
        _print_list()
        return 0
    switches = ("strict", "allow_learning_rate_change")
    processes = {"coordinator_address": "", "num_processes": 0, "process_id": -1}
    own, rest = split_flags(argv, ("workdir", "init_from", *processes), switches=switches, prefix="config")
    config = config_lib.parse_flags(rest)
    if "workdir" not in own:
        raise ConfigError("--workdir is missing: the folder of the run, for example --workdir=runs/first")
    use_compilation_cache()
    join_processes(**{k: config_lib.parse_value(own[k], v, f"--{k}") if k in own else v for k, v in processes.items()})
    options = {name: name in own for name in switches}
    return train(config, own["workdir"], init_from=own.get("init_from", ""), **options)


def _print_list() -> None:
    table = Table(title="Variants (--config=FILE.py:VARIANT)", title_justify="left")
    for column in ("variant", "kernel", "position", "gate", "layers", "source"):
        table.add_column(column)
    for row in VARIANTS.values():
        table.add_row(row.name, row.kernel, row.position, row.gate, " ".join(row.layer_pattern), row.source)
    Console().print(table)
    print("Configs:")
    for path in sorted(pathlib.Path("configs").rglob("*.py")):
        if path.name != "__init__.py":
            print(f"  {path}")


def eval_main(argv: Sequence[str]) -> int:
    """eval.py; returns the exit code."""
    return one_line_errors(_eval, argv)


def _eval(argv: Sequence[str]) -> int:
    known = ("workdir", "lengths", "step", "data", "name", "num_documents", "window", "stride", "task")
    own, rest = split_flags(argv, [*known, *retrieval.FLAGS, *AT_EVALUATION])
    del rest
    if "workdir" not in own:
        raise ConfigError("--workdir is missing: the folder of a trained run")
    use_compilation_cache()
    task = _task(own, load_config(own["workdir"]))
    overrides = {name: own[name] for name in AT_EVALUATION if name in own}
    step = own.get("step", "latest")
    if step not in ("latest", "best") and not step.isdigit():
        raise ConfigError(f"--step = {step!r}: choose latest, best or a step number{nearest(step, ('latest', 'best'))}")
    model, params, step = load_step(own["workdir"], int(step) if step.isdigit() else step, overrides=overrides)
    config = model.config
    run = {"step": step, "variant": config.variant, "seed": config.seed, "dtype": config.model.dtype}
    run["position_overrides"] = {key: value for key, value in overrides.items() if key.startswith("position.")}
    places = {"workdir": own["workdir"], "data": own.get("data", config.data.heldout), "run": run}
    lengths = _integers(own, "lengths", config.evaluation.lengths)
    if task != LENGTH_GENERALISATION:
        flags = {flag: own[flag] for flag in retrieval.FLAGS if flag in own}
        name = own.get("name", task)
        return retrieval.evaluate_task(task, model, params, lengths=lengths, name=name, flags=flags, **places)
    return evaluate(
        config,
        model,
        params,
        lengths=lengths,
        num_documents=_integers(own, "num_documents", (config.evaluation.num_documents,))[0],
        window=_integers(own, "window", (0,))[0],
        stride=_integers(own, "stride", (0,))[0],
        name=own.get("name", LENGTH_GENERALISATION),
        **places,
    )


def _task(flags: dict[str, str], saved: Config) -> str:
    """What to evaluate: --task, else the task that the run was trained on, else length generalisation."""
    task = flags.get("task", saved.data.heldout if saved.data.heldout in TASKS else LENGTH_GENERALISATION)
    if task != LENGTH_GENERALISATION:
        retrieval.check_task(task)
        foreign = ("num_documents", "window", "stride")
    else:
        foreign = retrieval.FLAGS
        if flags.get("data", saved.data.heldout) in TASKS:
            raise ConfigError("--task = length_generalisation: needs text; name a store with --data=STORE")
    for flag in foreign:
        if flag in flags:
            raise ConfigError(f"--{flag}: does not belong to --task={task}")
    return task


def _integers(flags: dict[str, str], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return config_lib.parse_value(flags[name], default, f"--{name}") if name in flags else default


def evaluate(
    config: Config, model, params, *, workdir: str, data: str, lengths, num_documents, window, stride, name: str, run
) -> int:
    """Length generalisation of one model: the table on the screen, and the files under workdir/eval."""
    store = open_data(data, "heldout", seq_len=max(lengths))
    if store.segmented:
        raise ValueError(
            f"data {data!r}: its rows are packed or padded documents, which hold no long context to score; name a "
            "store of whole rows with --data"
        )
    if max(lengths) > store.document_length:
        print(f"documents hold {store.document_length:,} tokens: they are joined into rows of {max(lengths):,}")
        store = concat_view(store, max(lengths))
    result, arrays = length_generalisation(
        model,
        params,
        store,
        lengths=lengths,
        train_length=config.data.seq_len,
        num_documents=num_documents,
        chunk_size=config.evaluation.chunk_size,
        window=window,
        stride=stride,
        run=run,
    )
    folder = pathlib.Path(workdir) / "eval"
    write_result(folder, name, result, arrays)
    style.save(length_generalisation_figure([result]), folder / f"{name}.png")
    text = read_documents(store, arrays["document_ids"][:1], min(lengths))
    curves = distance_curves(model, params, text, query_position=max(lengths) - 1)
    if curves["layers"]:
        write_json(folder / "position_bias.json", curves)
        style.save(position_bias_figure(curves), folder / "position_bias.png")
    Console().print(length_table(result))
    print(f"corpus {result['data']['digest']}")
    print(verdict(result))
    print(f"plot: {folder / name}.png")
    return 0
