"""The training run: resume or start, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from sympow_jax.config import Config
from sympow_jax.files import check_folder_name
from sympow_jax.input_pipeline.prefetch import Prefetch
from sympow_jax.models import flops, remat
from sympow_jax.models.model import Model
from sympow_jax.sharding.agreement import from_first
from sympow_jax.training import peak, run_files, same_run
from sympow_jax.training.bad_steps import BadSteps
from sympow_jax.training.checkpoint import Checkpointer, CheckpointError
from sympow_jax.training.clock import Clock
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.data import RunData, open_run_data
from sympow_jax.training.heldout import Heldout
from sympow_jax.training.initial_weights import InitialWeights, plan_initial_weights
from sympow_jax.training.metrics import MetricsWriter, check_wandb, last_logged_step
from sympow_jax.training.patterns import check_patterns
from sympow_jax.training.screen import print_first_screen
from sympow_jax.training.signals import EXIT_UNSAVED, StopRequest
from sympow_jax.training.step import train_steps
from sympow_jax.training.step_folders import list_steps
from sympow_jax.training.step_reports import StepReports
from sympow_jax.training.teacher import load_teacher
from sympow_jax.training.train_state import (
    TrainState,
    abstract_params,
    abstract_train_state,
    check_host_memory,
    create_train_state,
    from_tree,
    to_tree,
)
from sympow_jax.training.workdir import WorkdirLock, refuse_links
from sympow_jax.typing import PyTree


@dataclasses.dataclass
class Run:
    """The parts of a run in progress."""

    config: Config
    workdir: pathlib.Path
    model: Model
    mesh: Mesh
    data: RunData
    train_steps: Any
    heldout: Heldout
    checkpointer: Checkpointer
    writer: MetricsWriter
    stop: StopRequest
    clock: Clock
    reports: StepReports
    evaluated_step: int = -1
    heldout_loss: float | None = None


def train(
    config: Config,
    workdir: str,
    *,
    strict: bool = False,
    allow_learning_rate_change: bool = False,
    init_from: str = "",
    init_from_allow: str = "",
) -> int:
    """Trains to config.num_train_steps in `workdir`, continuing what is there; returns the exit code (see signals).

    Args:
      config: resolved configuration.
      workdir: made if absent; a workdir with checkpoints is resumed bit for bit.
      strict: a damaged newest checkpoint is an error instead of a warning and a fall-back.
      allow_learning_rate_change: accept changed learning-rate fields on resume.
      init_from: WORKDIR[:STEP] of a run whose parameters a new run starts from (see initial_weights).
      init_from_allow: patterns of parameters that may start anew.

    Raises:
      ConfigError, WorkdirError, CheckpointError, BadStepsError: one line each.
    """
    clock = Clock()
    check_folder_name(workdir, "--workdir")
    same_run.check_shared(workdir)
    same_run.check_settings(
        config,
        strict=strict,
        init_from=init_from,
        init_from_allow=init_from_allow,
        allow_learning_rate_change=allow_learning_rate_change,
    )
    remat.check_backend(config.model.remat)
    check_wandb(config.logging.wandb_project)
    refuse_links(workdir)
    config = run_files.resolve_for(config, workdir)
    run_files.check_resume(config, workdir, allow_learning_rate_change=allow_learning_rate_change)
    mesh = config_mesh(config)
    data = open_run_data(config, mesh)
    same_run.check_same_data(config, data)
    model = Model(config, data.vocab_size, mesh)
    check_patterns(config.optimizer, abstract_params(model))
    check_host_memory(model)
    begun = from_first("begun", lambda: bool(list_steps(pathlib.Path(workdir) / "checkpoints")))
    initial = plan_initial_weights(
        init_from, workdir, model, data.tokenizer.digest, has_checkpoints=begun, allow=init_from_allow
    )
    teacher = load_teacher(model, workdir, initial)
    first = jax.process_index() == 0
    with WorkdirLock(workdir) if first else contextlib.nullcontext(), StopRequest() as stop:
        if first:
            run_files.save_run_files(config, workdir, data)
        heldout = Heldout(config, model, data, stop.poll)
        with _open_checkpointer(config, workdir) as checkpointer:
            state, metadata = _state_to_go_on_from(checkpointer, model, initial, workdir, strict=strict)
            first_step = int(state.step)
            if first_step >= config.num_train_steps and metadata.get("evaluated_step") == first_step:
                _say(
                    f"{workdir} is finished: {first_step} of {config.num_train_steps} steps. Evaluate it with eval.py."
                )
                return 0
            if first:
                print_first_screen(config, state.params, data, mesh, first_step, workdir)
            if first_step:
                lost = max(0, min(last_logged_step(workdir), config.num_train_steps) - first_step)
                _say(clock.restored(checkpointer.restore_seconds, lost))
            with _open_writer(config, workdir, first_step) as writer:
                bad_steps = BadSteps(state.params, data.train, writer, max_in_a_row=config.optimizer.max_skipped_steps)
                reports = StepReports(config, bad_steps, writer, clock)
                steps = train_steps(model, teacher)
                run = Run(
                    config, pathlib.Path(workdir), model, mesh, data, steps, heldout, checkpointer, writer, stop, clock,
                    reports,
                    evaluated_step=metadata.get("evaluated_step", -1),
                    heldout_loss=metadata.get("heldout_loss"),
                )  # fmt: skip
                code, last_step = _run_steps(run, state, first_step)
                _say(clock.summary(last_step - first_step))
                return code


def _open_checkpointer(config: Config, workdir: str) -> Checkpointer:
    k = config.checkpoint
    return Checkpointer(f"{workdir}/checkpoints", keep_last=k.keep_last, keep_every=k.keep_every, keep_best=k.keep_best)


def _initial_state(model: Model, initial: InitialWeights | None, workdir: str) -> TrainState:
    """The state of a run that has no checkpoint yet."""
    state = create_train_state(model, model.config.seed)
    if initial is None:
        return state
    if jax.process_index() == 0:
        initial.record(workdir)
    _say(initial.describe())
    return dataclasses.replace(state, params=initial.apply(state.params))


def _open_writer(config: Config, workdir: str, first_step: int) -> MetricsWriter:
    return MetricsWriter(
        workdir,
        resume_step=first_step,
        total_steps=config.num_train_steps,
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        config=dataclasses.asdict(config),
    )


def _state_to_go_on_from(
    checkpointer: Checkpointer, model: Model, initial: InitialWeights | None, workdir: str, *, strict: bool
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and the metadata of its checkpoint; one state exists at a time."""
    if not from_first("steps", checkpointer.steps):
        damaged = sorted(path.name for path in checkpointer.directory.glob("*.damaged"))
        if damaged:
            raise CheckpointError(
                f"{checkpointer.directory} holds only damaged checkpoints ({', '.join(damaged)}); restore one from a "
                "copy, or start anew in another --workdir"
            )
        return _initial_state(model, initial, workdir), {}
    shapes = abstract_train_state(model)
    restored = checkpointer.restore("latest", like=to_tree(shapes), strict=strict)
    return from_tree(restored.tree, shapes), restored.metadata


def _run_steps(run: Run, state: TrainState, first_step: int) -> tuple[int, int]:
    """Exit code, and the last step."""
    config, stop = run.config, run.stop
    last = max(config.num_train_steps, first_step)  # a run that had more steps is evaluated, and finished
    if first_step and _evaluation_due(run, first_step):  # a stop came in between
        if not _evaluate(run, state, first_step):
            return _save_and_stop(run, state, first_step)
        run.checkpointer.add(first_step, **_measured(run, first_step))
    batches = run.data.prefetch(first_step, last)
    _begin(run, batches, state.params, first_step)
    for index, batch in _after_reports(batches, run.reports):
        step = index + 1
        state, metrics = _step(run, state, run.data.place(batch), step)
        run.reports.see(step, metrics)
        if _evaluation_due(run, step) and not _evaluate(run, state, step):
            return _save_and_stop(run, state, step)
        if step % config.checkpoint.every_steps == 0 or step == last:
            _save(run, state, step, force=step == last)
        if stop.poll() and step < last:
            return _save_and_stop(run, state, step)
    batches.close()
    return EXIT_UNSAVED if _say_unsaved(run) else 0, last


def _after_reports(batches: Prefetch, reports: StepReports) -> Iterator[tuple[int, PyTree]]:
    """The batches; where the data fail, the last step is reported first."""
    try:
        yield from batches
    except Exception:
        reports.flush()
        raise


def _step(run: Run, state: TrainState, batch: PyTree, step: int) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step; the chosen ones are traced into workdir/profile/STEP, for xprof or Perfetto."""
    train_step = run.train_steps(step)
    if step not in run.config.logging.profile_steps:
        return train_step(state, batch)
    with jax.profiler.trace(run.workdir / "profile" / str(step)):
        return jax.block_until_ready(train_step(state, batch))


def _evaluation_due(run: Run, step: int) -> bool:
    every = run.config.evaluation.every_steps
    due = step >= run.config.num_train_steps or (every > 0 and step % every == 0)
    return due and run.evaluated_step != step


def _evaluate(run: Run, state: TrainState, step: int) -> bool:
    """Writes what is measured on held-out data; False when a stop request came in between."""
    run.reports.flush()
    with run.clock.evaluating(step):
        row = run.heldout.measure(state.params)
    if row is None:
        return False
    run.evaluated_step, run.heldout_loss = step, row["heldout_loss"]
    run.writer.write(step, row)
    return True


def _save(run: Run, state: TrainState, step: int, *, force: bool) -> None:
    run.reports.flush()  # its row must be on disk before a checkpoint that makes it final
    if run.checkpointer.save(step, to_tree(state), **_measured(run, step), force=force):
        run.clock.saved(run.checkpointer.save_stall_seconds)


def _measured(run: Run, step: int) -> dict[str, Any]:
    """What the checkpoint of a step says of the held-out loss."""
    fresh = run.heldout_loss if run.evaluated_step == step else None
    metrics = {} if fresh is None else {"heldout_loss": fresh}
    return {"metadata": {"evaluated_step": run.evaluated_step, "heldout_loss": run.heldout_loss}, "metrics": metrics}


def _say_unsaved(run: Run) -> bool:
    """Names the checkpoints that were due and are missing, and those there are; False when none is missing."""
    missing = run.checkpointer.failed_steps
    if missing:
        _say(f"not saved: steps {missing} (the errors are above); on disk: steps {run.checkpointer.steps()}")
    return bool(missing)


def _save_and_stop(run: Run, state: TrainState, step: int) -> tuple[int, int]:
    _save(run, state, step, force=True)
    _say_unsaved(run)
    _say(f"stopped at step {step}; the checkpoint is saved, and the same command continues from it")
    return run.stop.exit_code, step


def _begin(run: Run, batches: Prefetch, params: PyTree, first_step: int) -> None:
    c = run.config
    run.clock.begin(
        first_step,
        batches,
        tokens_per_step=c.data.batch_size * c.data.seq_len,
        flops_per_token=sum(flops.train_flops_per_token(c, params, c.data.seq_len)),
        peak_flops=peak.peak_flops(c.logging.peak_flops, c.model.dtype),
        num_devices=run.mesh.size,
    )


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text)
