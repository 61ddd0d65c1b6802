"""One evaluation of one run: the numbers, the table on the screen, and the files under workdir/eval."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sympow_jax.config import TASKS, Config, ConfigError, nearest
from sympow_jax.evals import retrieval
from sympow_jax.evals.files import write_json, write_result
from sympow_jax.evals.length_generalisation import length_generalisation, read_documents
from sympow_jax.evals.position_bias import distance_curves
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.views import concat_view
from sympow_jax.loading import load_step
from sympow_jax.models.model import Model
from sympow_jax.plots import style
from sympow_jax.plots.heatmap import accuracy_heatmap
from sympow_jax.plots.length_generalisation import length_generalisation_figure
from sympow_jax.plots.position_bias import position_bias_figure
from sympow_jax.plots.tables import accuracy_table, length_table, verdict
from sympow_jax.typing import PyTree

LENGTH_GENERALISATION = "length_generalisation"
RETRIEVAL_TASKS = (*TASKS, "needle")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_EXAMPLES = {"mqar": 256, "copy": 64, "selective_copy": 64, "passkey": 32, "needle": 32}


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """What to measure of a run.

    Attributes:
      workdir: the run; results go to workdir/eval/<name>.{json,npz,png}.
      task: LENGTH_GENERALISATION or one of RETRIEVAL_TASKS.
      lengths: contexts in tokens; the columns of a task's grid.
      data: the store that is scored, or that a needle is hidden in.
      name: of the result files.
      step: "latest", "best" or a number.
      overrides: settings that do not belong to the parameters (loading.AT_EVALUATION), as text.
      num_documents, window, stride: of length generalisation; window 0 is off, stride 0 the default.
      num_examples, pairs, depths: of a task's grid, as far as it has these axes.
    """

    workdir: str
    task: str
    lengths: tuple[int, ...]
    data: str
    name: str
    step: str | int = "latest"
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_documents: int = 0
    window: int = 0
    stride: int = 0
    num_examples: int = 0
    pairs: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()


def evaluate(request: EvaluationRequest) -> None:
    """Measures what the request asks for, prints the table and writes the files.

    Raises:
      ConfigError, CheckpointError, FileError, ValueError: one line each.
    """
    model, params, step = load_step(request.workdir, request.step, overrides=request.overrides)
    config = model.config
    run = {"step": step, "variant": config.variant, "seed": config.seed, "dtype": config.model.dtype}
    run["position_overrides"] = {k: v for k, v in request.overrides.items() if k.startswith("position.")}
    measure = _lengths if request.task == LENGTH_GENERALISATION else _task
    measure(request, model, params, run)
    print(f"plot: {pathlib.Path(request.workdir) / 'eval' / request.name}.png")


def _lengths(request: EvaluationRequest, model: Model, params: PyTree, run: dict[str, Any]) -> None:
    """Length generalisation, and the learned biases and gates by distance."""
    config, longest = model.config, max(request.lengths)
    store = open_data(request.data, "heldout", seq_len=longest)
    if store.segmented:
        raise ValueError(
            f"data {request.data!r}: its rows are packed or padded documents, which hold no long context to score; "
            "name a store of whole rows with --data"
        )
    if longest > store.document_length:
        print(f"documents hold {store.document_length:,} tokens: they are joined into rows of {longest:,}")
        store = concat_view(store, longest)
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
    write_result(folder, request.name, result, arrays)
    style.save(length_generalisation_figure([result]), folder / f"{request.name}.png")
    text = read_documents(store, arrays["document_ids"][:1], min(request.lengths))
    curves = distance_curves(model, params, text, query_position=longest - 1)
    if curves["layers"]:
        write_json(folder / "position_bias.json", curves)
        style.save(position_bias_figure(curves), folder / "position_bias.png")
    Console().print(length_table(result))
    print(f"corpus {result['data']['digest']}")
    print(verdict(result))


def check_task(name: str) -> None:
    """Raises ConfigError for a task that does not exist."""
    if name not in RETRIEVAL_TASKS:
        hint = nearest(name, RETRIEVAL_TASKS)
        raise ConfigError(f"--task = {name!r}: choose one of {', '.join(RETRIEVAL_TASKS)}{hint}")


def grid_axes(task: str) -> tuple[str, ...]:
    """What a task's grid has besides lengths: pairs (mqar, selective_copy), depths (passkey, needle) or nothing."""
    return {"passkey": ("depths",), "needle": ("depths",), "copy": ()}.get(task, ("pairs",))


def _task(request: EvaluationRequest, model: Model, params: PyTree, run: dict[str, Any]) -> None:
    """Recall over length x pairs, x depth, or length alone."""
    config = model.config
    options: dict[str, Any] = {
        "lengths": sorted({*request.lengths}),
        "num_examples": request.num_examples,
        "train_length": config.data.seq_len,
        **{axis: getattr(request, axis) for axis in grid_axes(request.task)},
    }
    matcher = retrieval.Matcher(model, params, chunk_size=config.evaluation.chunk_size)
    grid, arrays = _grid(request, config, matcher, model.vocab_size, options)
    result = {"task": request.task, **run, **grid}
    folder = pathlib.Path(request.workdir) / "eval"
    write_result(folder, request.name, result, arrays)
    style.save(accuracy_heatmap(result, title=f"{config.variant}: {request.task}"), folder / f"{request.name}.png")
    Console().print(accuracy_table(result))


def _grid(
    request: EvaluationRequest, config: Config, matcher: retrieval.Matcher, vocab_size: int, options: dict[str, Any]
) -> retrieval.Grid:
    t, task = config.task, request.task
    if task == "mqar":
        filler = {"power": t.power, "random_filler": t.random_filler, "num_passes": t.num_passes}
        return retrieval.mqar_grid(matcher, vocab_size=vocab_size, **filler, **options)
    if task == "passkey":
        return retrieval.depth_grid(matcher, tokenizer=f"{request.workdir}/tokenizer", **options)
    if task == "needle":
        return retrieval.depth_grid(matcher, haystack=_haystack(request.data, max(options["lengths"])), **options)
    content = options.pop("pairs", ())
    return retrieval.copy_grid(matcher, vocab_size=vocab_size, num_content=content, **options)


def _haystack(data: str, length: int) -> Store:
    if data in TASKS:
        raise ConfigError(f"--data = {data!r}: a needle needs text to hide in; give a store, for example python-stdlib")
    store = open_data(data, "heldout", seq_len=length)
    return store if length <= store.document_length else concat_view(store, length)
