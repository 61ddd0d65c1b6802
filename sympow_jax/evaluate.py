"""One evaluation of one run: the numbers, the table on the screen, and the files under workdir/eval."""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from rich.console import Console

from sympow_jax.config import TASKS, Config, ConfigError, diff
from sympow_jax.config.absent import ABSENT
from sympow_jax.config.layer_specs import absolute_position
from sympow_jax.evals import remembrance, retrieval
from sympow_jax.evals.distance_curves import distance_curves
from sympow_jax.evals.files import inputs_digest, plain, write_csv, write_json, write_result
from sympow_jax.evals.length_generalisation import length_generalisation, read_documents
from sympow_jax.evals.length_summary import CSV_HEADER, csv_rows
from sympow_jax.evaluation_request import NEEDLE, OF_TEXT, REMEMBRANCE, EvaluationRequest, bias_name, grid_axes, inputs
from sympow_jax.files import inside, read_json
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.tasks.task_store import KINDS
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from sympow_jax.input_pipeline.views import ConcatView
from sympow_jax.loading import check_stream, evaluation_config, load_step
from sympow_jax.models.model import Model
from sympow_jax.plots import style
from sympow_jax.plots.distance_curves import distance_figure
from sympow_jax.plots.heatmap import accuracy_heatmap
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from sympow_jax.plots.remembrance import remembrance_figure
from sympow_jax.plots.tables import accuracy_table, length_table, remembrance_table, verdict
from sympow_jax.training import same_run
from sympow_jax.training.evaluation_mesh import evaluation_mesh, mesh_note
from sympow_jax.training.run_files import load_config
from sympow_jax.training.step_folders import list_steps
from sympow_jax.training.workdir import WorkdirLock
from sympow_jax.typing import PyTree


def evaluate(request: EvaluationRequest) -> None:
    """Measures what the request asks for, prints the table and writes the files.

    Raises:
      ConfigError, CheckpointError, FileError, ValueError, OSError: one line each.
    """
    saved = load_config(request.workdir)
    config = evaluation_config(saved, request.overrides)
    _check_scaling_reached(request, config)
    _check_positions(request, config)
    same_run.check_shared(request.workdir)
    same_run.check_settings(config, **dataclasses.asdict(request))
    folder = inside(request.workdir, "eval")
    with _lock(request, folder) if _is_first() else contextlib.nullcontext():
        _measure(request, saved, config)
    _say(f"plot: {folder / request.name}.png")


def _lock(request: EvaluationRequest, folder: pathlib.Path) -> WorkdirLock:
    """Of the files that this evaluation writes, by the first of its processes."""
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise OSError(f"--workdir={request.workdir}: {folder} cannot be written, and the results go there")
    return WorkdirLock(
        folder, name=f".{request.name}.lock", what=f"--name={request.name}: {folder}/{request.name}.json"
    )


def _is_first() -> bool:
    return jax.process_index() == 0


def _say(text: str) -> None:
    if _is_first():
        print(text)


def _measure(request: EvaluationRequest, saved: Config, config: Config) -> None:
    mesh = evaluation_mesh(saved, request.mesh)
    store = _open(request, config)
    same_run.check_store(request.data, "" if store is None else store.digest)
    _say(mesh_note(saved, mesh, request.mesh))
    model, params, step = load_step(request.workdir, request.step, overrides=request.overrides, mesh=mesh)
    changes = diff(saved, config)
    run = {
        "step": step,
        "variant": config.variant,
        "seed": config.seed,
        "dtype": config.model.dtype,
        "position_overrides": {path: changes[path][1] for path in changes if path.startswith("position.")},
    }
    made_from = {"inputs": inputs(request, config, step, _data_digest(request, store))}
    if request.task not in OF_TEXT:
        if model.streams and max(request.lengths) > config.evaluation.chunk_size:
            check_stream(model.config, request.overrides)
        _tasks(request, model, params, store, run, made_from)
        return
    assert store is not None  # _open gives one to these
    if model.streams_constant:
        check_stream(model.config, request.overrides)
    measure = _remembrance if request.task == REMEMBRANCE else _lengths
    measure(request, model, params, store, run, made_from)


def is_current(request: EvaluationRequest, config: Config) -> bool:
    """Whether the result file under the request's name holds what `evaluate` would measure now.

    Args:
      request: with a step number.
      config: of the run, as it is, or would be, saved in the workdir.
    """
    path = pathlib.Path(request.workdir) / "eval" / f"{request.name}.json"
    checkpoints = list_steps(pathlib.Path(request.workdir) / "checkpoints")
    if not path.exists() or not isinstance(request.step, int) or request.step not in checkpoints:
        return False
    config = evaluation_config(config, request.overrides)
    store = _open(request, config)
    result = read_json(path)
    made_from = inputs(request, config, request.step, _data_digest(request, store))
    return _with_absent(result.get("inputs")) == _with_absent(made_from)


def _with_absent(made_from: Any) -> Any:
    """Inputs with the settings that did not exist when they were written."""
    if not isinstance(made_from, dict) or not isinstance(made_from.get("settings"), dict):
        return made_from
    return made_from | {"settings": json.loads(json.dumps(dict(ABSENT))) | made_from["settings"]}


def _check_scaling_reached(request: EvaluationRequest, config: Config) -> None:
    p, longest = config.position, max(request.lengths)
    if p.scaling == "dynamic_ntk" and "position.scaling" in request.overrides and longest <= p.original_length:
        raise ConfigError(
            f"--position.scaling = 'dynamic_ntk': has no effect up to position.original_length = {p.original_length}; "
            f"ask for longer --lengths than {longest}, or leave it out"
        )


def _check_positions(request: EvaluationRequest, config: Config) -> None:
    rows, longest = config.position.max_length, max(request.lengths)
    if absolute_position(config) == "learned_absolute" and longest > rows:
        raise ConfigError(
            f"--lengths = {longest}: learned_absolute has positions for {rows} tokens; ask for at most {rows}, or "
            "train with a larger --config.position.max_length"
        )


def _open(request: EvaluationRequest, config: Config) -> Store | None:
    """The held-out rows, as long as the longest context, that are scored or that a needle is hidden in."""
    longest = max(request.lengths)
    if request.task not in (*OF_TEXT, NEEDLE):
        return None
    if request.data in TASKS:
        raise ConfigError(f"--data = {request.data!r}: {request.task} needs text; give a store, such as python-stdlib")
    store = open_data(request.data, "heldout", seq_len=longest)
    if store.segmented and request.task in OF_TEXT:
        raise ValueError(
            f"data {request.data!r}: its rows are packed or padded documents, which hold no long context to score; "
            "name a store of whole rows with --data"
        )
    _check_tokenizer(request, store)
    if longest <= store.document_length:
        return store
    _say(f"documents hold {store.document_length:,} tokens: they are joined into rows of {longest:,}")
    return ConcatView(store, longest)


def _check_tokenizer(request: EvaluationRequest, store: Store) -> None:
    """Ids of another tokenizer would be scored as if they were the run's: a plausible table, or nan."""
    own = pathlib.Path(request.workdir) / "tokenizer"
    theirs, ours = store.tokenizer.digest, load_tokenizer(own).digest
    if theirs != ours:
        raise ConfigError(
            f"--data = {request.data!r}: its tokeniser (digest {theirs[:12]}) is not that of the run ({ours[:12]}), so "
            f"its ids are other tokens; make a store of the text with prepare.py --tokenizer={own}"
        )


def _data_digest(request: EvaluationRequest, store: Store | None) -> str:
    """Of what decides the tokens of the questions, besides the settings."""
    if store is not None:
        return str(store.digest)
    of_words = request.task in KINDS and KINDS[request.task].of_words
    return load_tokenizer(f"{request.workdir}/tokenizer").digest if of_words else ""


def _lengths(
    request: EvaluationRequest,
    model: Model,
    params: PyTree,
    store: Store,
    run: dict[str, Any],
    made_from: dict[str, Any],
) -> None:
    """Length generalisation, and the learned biases and gates by distance."""
    config, longest = model.config, max(request.lengths)
    result, arrays = length_generalisation(
        model,
        params,
        store,
        lengths=request.lengths,
        train_length=config.data.seq_len,
        num_documents=request.num_documents,
        chunk_size=config.evaluation.chunk_size,
        window=request.window,
        stride=request.stride,
        run=run,
    )
    folder = pathlib.Path(request.workdir) / "eval"
    text = read_documents(store, arrays["document_ids"][:1], min(longest, config.data.seq_len))
    curves = distance_curves(model, params, text, query_position=longest - 1)
    if not _is_first():
        return
    result, curves = plain(result | made_from), plain(curves)
    if curves["layers"]:
        where = folder / bias_name(request.name)
        write_json(f"{where}.json", curves | {"inputs": inputs_digest(made_from["inputs"])})
        style.save(distance_figure(curves), f"{where}.png")
    style.save(length_generalisation_figure([result]), folder / f"{request.name}.png")
    write_csv(folder / f"{request.name}.csv", CSV_HEADER, csv_rows(result))
    write_result(folder, request.name, result, arrays)
    Console(markup=False).print(length_table(result))
    print(f"corpus {result['data']['digest']}")
    print(verdict(result))


def _remembrance(
    request: EvaluationRequest,
    model: Model,
    params: PyTree,
    store: Store,
    run: dict[str, Any],
    made_from: dict[str, Any],
) -> None:
    """What the end of the longest context owes to the tokens before each position, and the states there."""
    config = model.config
    result, arrays = remembrance.remembrance(
        model,
        params,
        store,
        length=max(request.lengths),
        train_length=config.data.seq_len,
        num_documents=request.num_documents,
        chunk_size=config.evaluation.chunk_size,
        run=run,
    )
    if not _is_first():
        return
    result = plain(result | made_from)
    folder = pathlib.Path(request.workdir) / "eval"
    style.save(remembrance_figure(result), folder / f"{request.name}.png")
    write_csv(folder / f"{request.name}.csv", remembrance.CSV_HEADER, remembrance.csv_rows(result))
    write_result(folder, request.name, result, arrays)
    Console(markup=False).print(remembrance_table(result))
    print(f"corpus {result['data']['digest']}")


def _tasks(
    request: EvaluationRequest,
    model: Model,
    params: PyTree,
    store: Store | None,
    run: dict[str, Any],
    made_from: dict[str, Any],
) -> None:
    """Recall over length x pairs, x depth, or length alone."""
    config = model.config
    matcher = retrieval.Matcher(model, params, chunk_size=config.evaluation.chunk_size)
    grid, arrays = _grid(request, config, matcher, model.vocab_size, store)
    if not _is_first():
        return
    result = plain({"task": request.task, **run, **grid, **made_from})
    folder = pathlib.Path(request.workdir) / "eval"
    style.save(accuracy_heatmap(result, title=f"{config.variant}: {request.task}"), folder / f"{request.name}.png")
    write_result(folder, request.name, result, arrays)
    Console(markup=False).print(accuracy_table(result))


def _grid(
    request: EvaluationRequest, config: Config, matcher: retrieval.Matcher, vocab_size: int, store: Store | None
) -> retrieval.Grid:
    """The settings are the run's; vocabulary and tokenizer are those that it has."""
    settings = dataclasses.replace(config.task, vocab_size=vocab_size, tokenizer=f"{request.workdir}/tokenizer")
    return retrieval.task_grid(
        matcher,
        request.task,
        settings,
        lengths=sorted(request.lengths),
        haystack=store,
        num_examples=request.num_examples,
        train_length=config.data.seq_len,
        **{axis: getattr(request, axis) for axis in grid_axes(request.task)},
    )
