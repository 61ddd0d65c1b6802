"""The command eval.py: flags -> one EvaluationRequest -> evaluate (the script's docstring lists the flags)."""

from collections.abc import Sequence

from sympow_jax.command_line import (
    MESH_FLAGS,
    PROCESS_FLAGS,
    flag_value,
    joined_processes,
    mesh_flags,
    run_program,
    split_flags,
    step_flag,
    use_compilation_cache,
)
from sympow_jax.config import TASKS, Config, ConfigError
from sympow_jax.evaluate import evaluate
from sympow_jax.evaluation_request import (
    DEPTHS,
    LENGTH_GENERALISATION,
    NEEDLE,
    NUM_EXAMPLES,
    OF_TEXT,
    REMEMBRANCE,
    EvaluationRequest,
    check_task,
    grid_axes,
    lengths_of,
)
from sympow_jax.loading import AT_EVALUATION
from sympow_jax.training.cpu_devices import use_cpu_devices_of_run
from sympow_jax.training.run_files import load_config

_OF_LENGTHS = ("num_documents", "window", "stride")
_OF_TASKS = ("pairs", "depths", "num_examples")
_SWITCH = "remembrance"
_OF_ALL = ("workdir", "lengths", "step", "data", "name", "task", *AT_EVALUATION, *MESH_FLAGS, *PROCESS_FLAGS)
_KNOWN = (*_OF_ALL, *_OF_LENGTHS, *_OF_TASKS)


def run(argv: Sequence[str]) -> int:
    """Evaluates as the flags say; returns the exit code."""
    flags, _ = split_flags(argv, _KNOWN, switches=(_SWITCH,))
    if "workdir" not in flags:
        raise ConfigError("--workdir is missing: the folder of a trained run")
    use_compilation_cache()
    with joined_processes(flags):
        saved = load_config(flags["workdir"])
        use_cpu_devices_of_run(saved)
        evaluate(_request(flags, saved))
    return 0


def _request(flags: dict[str, str], saved: Config) -> EvaluationRequest:
    task = _task(flags, saved)
    e = saved.evaluation
    return EvaluationRequest(
        workdir=flags["workdir"],
        task=task,
        step=step_flag(flags),
        overrides={name: flags[name] for name in AT_EVALUATION if name in flags},
        data=flags.get("data", saved.data.heldout),
        name=flags.get("name", task),
        lengths=flag_value(flags, "lengths", lengths_of(saved, task)),
        num_documents=flag_value(flags, "num_documents", e.num_documents),
        window=flag_value(flags, "window", 0, least=1),
        stride=flag_value(flags, "stride", 0, least=1),
        num_examples=flag_value(flags, "num_examples", NUM_EXAMPLES.get(task, 0)),
        pairs=flag_value(flags, "pairs", (saved.task.num_pairs,)),
        depths=flag_value(flags, "depths", DEPTHS),
        mesh=mesh_flags(flags),
    )


def _task(flags: dict[str, str], saved: Config) -> str:
    """What to evaluate: --remembrance or --task, else what the run was trained on, a task or text of growing length."""
    asked = flags.get("task", saved.data.heldout if saved.data.heldout in TASKS else LENGTH_GENERALISATION)
    task, named = (REMEMBRANCE, f"--{_SWITCH}") if _SWITCH in flags else (asked, f"--task={asked}")
    if _SWITCH in flags:
        foreign = ("task", "window", "stride", *_OF_TASKS)
    elif task == LENGTH_GENERALISATION:
        foreign = _OF_TASKS
    else:
        check_task(task)
        foreign = (*_OF_LENGTHS, *({"pairs", "depths"} - {*grid_axes(task)}), *(["data"] * (task != NEEDLE)))
    if task in OF_TEXT and flags.get("data", saved.data.heldout) in TASKS:
        raise ConfigError(f"{named}: needs text; name a store with --data=STORE")
    for flag in sorted(foreign):
        if flag in flags:
            raise ConfigError(f"--{flag}: does not belong to {named}")
    return task


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
