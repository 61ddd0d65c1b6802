"""eval.py --task=NAME: retrieval accuracy of a trained model over a grid, as table, JSON, npz and heat map."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from sympow_jax.config import TASKS, Config, ConfigError, nearest, parse_value
from sympow_jax.evals import retrieval
from sympow_jax.evals.files import write_result
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.input_pipeline.store import Store
from sympow_jax.input_pipeline.views import concat_view
from sympow_jax.models.registry import Model
from sympow_jax.plots import style
from sympow_jax.plots.heatmap import accuracy_heatmap
from sympow_jax.plots.tables import accuracy_table
from sympow_jax.typing import PyTree

RETRIEVAL_TASKS = (*TASKS, "needle")
FLAGS = ("pairs", "depths", "num_examples")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_EXAMPLES = {"mqar": 256, "copy": 64, "selective_copy": 64, "passkey": 32, "needle": 32}


def check_task(name: str) -> None:
    """Raises ConfigError for a task that does not exist."""
    if name not in RETRIEVAL_TASKS:
        hint = nearest(name, RETRIEVAL_TASKS)
        raise ConfigError(f"--task = {name!r}: choose one of {', '.join(RETRIEVAL_TASKS)}{hint}")


def evaluate_task(
    task: str,
    model: Model,
    params: PyTree,
    *,
    workdir: str,
    lengths: Sequence[int],
    data: str,
    name: str,
    flags: Mapping[str, str],
    run: Mapping[str, Any],
) -> int:
    """Accuracy over length x pairs (mqar, selective_copy), x depth (passkey, needle) or length alone (copy).

    Args:
      task: one of RETRIEVAL_TASKS.
      model, params: a trained model; the vocabulary is that of its training data.
      workdir: results go to workdir/eval/<name>.{json,npz,png}.
      lengths: columns of the grid, in tokens.
      data: the store that a needle is hidden in.
      flags: --pairs, --depths and --num_examples as text; others have defaults.
      run: what identifies the run in the file.
    """
    config = model.config
    lengths = sorted({*lengths})
    options: dict[str, Any] = {
        "lengths": lengths,
        "num_examples": _parse(flags, "num_examples", (NUM_EXAMPLES[task],))[0],
        "train_length": config.data.seq_len,
    }
    if task in ("passkey", "needle"):
        options["depths"] = _parse(flags, "depths", DEPTHS)
    elif task != "copy":
        options["pairs"] = _parse(flags, "pairs", (config.task.num_pairs,))
    unused = [flag for flag in ("pairs", "depths") if flag in flags and flag not in options]
    if unused:
        raise ConfigError(f"--{unused[0]}: does not belong to --task={task}")
    matcher = retrieval.Matcher(model, params, chunk_size=config.evaluation.chunk_size)
    grid, arrays = _grid(task, config, matcher, model.vocab_size, f"{workdir}/tokenizer", data, options)
    result = {"task": task, **run, **grid}
    folder = pathlib.Path(workdir) / "eval"
    write_result(folder, name, result, arrays)
    style.save(accuracy_heatmap(result, title=f"{config.variant}: {task}"), folder / f"{name}.png")
    Console().print(accuracy_table(result))
    print(f"plot: {folder / name}.png")
    return 0


def _parse(flags: Mapping[str, str], name: str, default: tuple) -> tuple:
    return parse_value(flags[name], default, f"--{name}") if name in flags else default


def _grid(
    task: str,
    config: Config,
    matcher: retrieval.Matcher,
    vocab_size: int,
    tokenizer: str,
    data: str,
    options: dict[str, Any],
) -> retrieval.Grid:
    t = config.task
    if task == "mqar":
        filler = {"power": t.power, "random_filler": t.random_filler, "num_passes": t.num_passes}
        return retrieval.mqar_grid(matcher, vocab_size=vocab_size, **filler, **options)
    if task == "passkey":
        return retrieval.depth_grid(matcher, tokenizer=tokenizer, **options)
    if task == "needle":
        return retrieval.depth_grid(matcher, haystack=_haystack(data, max(options["lengths"])), **options)
    content = options.pop("pairs", ())
    return retrieval.copy_grid(matcher, vocab_size=vocab_size, num_content=content, **options)


def _haystack(data: str, length: int) -> Store:
    if data in TASKS:
        raise ConfigError(f"--data = {data!r}: a needle needs text to hide in; give a store, for example python-stdlib")
    store = open_data(data, "heldout", seq_len=length)
    return store if length <= store.document_length else concat_view(store, length)
