"""Trains and evaluates several variants and seeds, and writes one table and one plot.

    python -m sympow_jax.sweep --config=configs/quickstart.py --variants=softmax_rope:0+1,sympow,fox --root=DIR
                               [--seeds=0] [--lengths=...] [--init_from=WORKDIR[:STEP]] [--config.a.b=value ...]

`--config=WORKDIR --init_from=WORKDIR` exchanges the attention of a trained model for each variant (docs/retrofit.md).
`--variants=all` is every row of the variants table; `NAME:0+1` gives one variant its own seeds. Each run lives in
ROOT/VARIANT-seedN and is an ordinary workdir: run the same command again after a kill and it continues there.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from sympow_jax import config as config_lib
from sympow_jax.command_line import flag_value, run_program, split_flags, use_compilation_cache
from sympow_jax.config import ConfigError, parse_variants
from sympow_jax.evals.result_shape import OF_A_RUN, read_result
from sympow_jax.evaluate import evaluate, is_current
from sympow_jax.evaluation_request import LENGTH_GENERALISATION, EvaluationRequest, lengths_of
from sympow_jax.files import write_json_atomic, write_text_atomic
from sympow_jax.plots import style
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from sympow_jax.training import run_files
from sympow_jax.training.loop import train


def run_one(
    config: config_lib.Config, workdir: pathlib.Path, lengths: Sequence[int], initial: tuple[str, str] = ("", "")
) -> int:
    """Trains to the end and evaluates, or does what of it is missing."""
    request = EvaluationRequest(
        workdir=str(workdir),
        task=LENGTH_GENERALISATION,
        lengths=tuple(lengths),
        data=config.data.heldout,
        name=LENGTH_GENERALISATION,
        step=config.num_train_steps,
        num_documents=config.evaluation.num_documents,
    )
    if is_current(request, run_files.resolve_for(config, str(workdir))):
        run_files.check_resume(run_files.resolve_for(config, str(workdir)), str(workdir))
        return 0
    code = train(config, str(workdir), init_from=initial[0], init_from_allow=initial[1])
    if code == 0:
        evaluate(request)
    return code


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Same-target loss of each run at each context, its paired change beyond the trained one, prefix loss there."""
    contexts = [row["context"] for row in results[0]["same_target"]]
    longest, trained = contexts[-1], results[0]["same_target_change"]["from_context"]
    columns = " | ".join(f"{context:,}" for context in contexts)
    lines = [
        f"| variant | seed | {columns} | change to {longest:,} [95%] | prefix at {trained:,} |",
        "|---|---|" + "---|" * (len(contexts) + 2),
    ]
    for result in results:
        change = result["same_target_change"]
        low, high = (_number(bound, "+.3f") for bound in change["ci95"][-1])
        prefix = next(row["nll"] for row in result["lengths"] if row["length"] == trained)
        losses = " | ".join(_number(row["nll"]) for row in result["same_target"])
        lines.append(
            f"| {result['variant']} | {result['seed']} | {losses} | {_number(change['difference'][-1], '+.3f')} "
            f"[{low}, {high}] | {_number(prefix)} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str = ".3f") -> str:
    """A number of a table; a dash where it is not finite, which JSON keeps as null."""
    return "-" if value is None else f"{value:{form}}"


def write_summary(root: pathlib.Path, workdirs: Sequence[pathlib.Path]) -> None:
    """ROOT/sweep.md, sweep.json and sweep.png of the runs that are evaluated."""
    files = [workdir / "eval" / f"{LENGTH_GENERALISATION}.json" for workdir in workdirs]
    results = [read_result(file, OF_A_RUN) for file in files if file.exists()]
    if results:
        write_text_atomic(root / "sweep.md", markdown_table(results))
        write_json_atomic(root / "sweep.json", results)
        style.save(length_generalisation_figure(results), root / "sweep.png")


def run(argv: Sequence[str]) -> int:
    """Runs the sweep that the flags name; returns the exit code."""
    known = ("variants", "seeds", "root", "lengths", *config_lib.INIT_FLAGS)
    own, rest = split_flags(argv, known, prefix="config")
    for name in ("variants", "root"):
        if name not in own:
            raise ConfigError(f"--{name} is missing; see python -m sympow_jax.sweep in README.md")
    seeds = flag_value(own, "seeds", (0,), least=0)
    runs = parse_variants(own["variants"], seeds)
    paths = [flag.partition(":")[0] for flag in rest if flag.startswith("--config=")]
    changes = [flag for flag in rest if not flag.startswith("--config=")]
    configs = [
        config_lib.parse_flags([*(f"{path}:{variant}" for path in paths), *changes, f"--config.seed={seed}"])
        for variant, seed in runs
    ]
    lengths = flag_value(own, "lengths", lengths_of(configs[0], LENGTH_GENERALISATION), least=1)
    root = pathlib.Path(own["root"])
    workdirs = [root / f"{variant}-seed{seed}" for variant, seed in runs]
    initial = config_lib.initial_weights_flags(own, rest)
    use_compilation_cache()
    for number, (config, workdir) in enumerate(zip(configs, workdirs, strict=True), start=1):
        print(f"sweep: run {number} of {len(runs)}, {workdir}", flush=True)
        code = run_one(config, workdir, lengths, initial)
        if code:
            return code
        write_summary(root, workdirs[:number])
    print(f"sweep: table {root / 'sweep.md'}, plot {root / 'sweep.png'}")
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
