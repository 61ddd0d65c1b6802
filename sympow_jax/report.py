"""One HTML page over several runs: python -m sympow_jax.report RUN [RUN ...] --output=FILE.html

Reads config.json, metrics.jsonl and eval/*.json, *.npz of each workdir; loads no checkpoint and needs no network. The
first run is what the paired differences are taken against.
"""

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sympow_jax.command_line import run_program, split_flags
from sympow_jax.config import Config, ConfigError, flatten, linear_specs, override
from sympow_jax.evals.files import inputs_digest, read_arrays
from sympow_jax.evals.paired import paired_difference
from sympow_jax.evals.result_shape import read_result
from sympow_jax.files import FileError, entry, one_line, write_text_atomic
from sympow_jax.models import flops
from sympow_jax.models.model import Model
from sympow_jax.models.state_bytes import state_bytes
from sympow_jax.plots.report import report_page
from sympow_jax.plots.style import run_labels
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.training.run_files import load_config, load_vocab_size

IGNORED_DIFFERENCES = ("logging.", "checkpoint.", "data.prefetch", "data.num_threads")

log = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    folders = [argument for argument in argv if not argument.startswith("--")]
    own, _ = split_flags([argument for argument in argv if argument.startswith("--")], ("output",))
    if not folders:
        raise ConfigError("no run given: python -m sympow_jax.report RUN [RUN ...] --output=FILE.html")
    output = own.get("output", "report.html")
    if pathlib.Path(output).suffix not in (".html", ".htm") or pathlib.Path(output).is_dir():
        raise ConfigError(f"--output = {output!r}: the page is a file; give it a name that ends in .html")
    page = report_page(gather(folders))
    write_text_atomic(output, page)
    print(f"report: {output} ({len(page.encode()) / 1e6:.2f} MB)")
    return 0


def gather(folders: Sequence[str]) -> dict[str, Any]:
    """What the page shows of these workdirs, as plain data (see plots.report.report_page).

    Raises:
      ConfigError: a folder is no workdir.
    """
    runs, evaluations, retrieval, biases, configs, arrays = [], [], [], [], [], []
    for folder in folders:
        path = pathlib.Path(folder)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{folder}: no workdir (it has no config.json)")
        config = load_config(str(path))
        found = [(file, read_result(file)) for file in sorted(path.glob("eval/*.json"))]
        made = {inputs_digest(result["inputs"]) for _, result in found if isinstance(result.get("inputs"), dict)}
        for file, result in found:
            _check_owner(file, result, config)
            if "same_target" in result:
                evaluations.append({"run": folder, "result": result})
                arrays.append((file, result))
            elif "accuracy" in result:
                retrieval.append({"run": folder, "title": result["task"], "result": result})
            elif "query_position" in result and result.get("inputs", "") not in {"", *made}:
                log.warning("%s is left out: it is of another evaluation than the results beside it", file)
            elif "query_position" in result:
                biases.append({"run": folder, "result": result})
        longest = max([config.data.seq_len, *(r["lengths"][-1]["length"] for _, r in found if "lengths" in r)])
        configs.append(config)
        runs.append({"folder": folder, "training": _training(path), "cost": _cost(path, config, longest)})
    names = _distinct([{"variant": config.variant, "seed": config.seed} for config in configs], folders)
    by_folder = dict(zip(folders, names, strict=True))
    for run in runs:
        run["label"] = by_folder[run["folder"]]
    for shown in retrieval + biases:
        shown["label"] = by_folder[shown["run"]]
    labels = _distinct([shown["result"] for shown in evaluations], [shown["run"] for shown in evaluations])
    for shown, label in zip(evaluations, labels, strict=True):
        shown["label"] = label
    return {
        "runs": runs,
        "evaluations": evaluations,
        "paired": _paired(labels, arrays),
        "biases": biases,
        "retrieval": retrieval,
        "config_differences": _differences(configs),
    }


def _distinct(results: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """Labels of runs, with the folder's name where two would be equal."""
    labels = run_labels(results)
    return [
        label if labels.count(label) == 1 else f"{label} [{pathlib.Path(folder).name}]"
        for label, folder in zip(labels, folders, strict=True)
    ]


def _training(path: pathlib.Path) -> dict[str, list]:
    """Losses by tokens; rows of metrics.jsonl hold training or held-out losses, or both."""
    training: dict[str, list] = {"tokens": [], "loss": [], "heldout_tokens": [], "heldout_loss": []}
    file = path / METRICS_NAME
    tokens_by_step: dict[int, float] = {}
    for row in read_metrics(file) if file.exists() else ():
        _check_numbers(row, ("tokens", "loss", "heldout_loss"), str(file))
        if row.get("tokens") is not None:
            tokens_by_step[row["step"]] = row["tokens"]
        if "loss" in row and row.get("tokens") is not None:
            training["tokens"].append(row["tokens"])
            training["loss"].append(row["loss"])
        if "heldout_loss" in row and row["step"] in tokens_by_step:
            training["heldout_tokens"].append(tokens_by_step[row["step"]])
            training["heldout_loss"].append(row["heldout_loss"])
    return training


def _check_numbers(row: Mapping[str, Any], names: Sequence[str], file: str) -> None:
    """Raises FileError where one of `names` in a row of metrics is neither a number nor null."""
    for name in names:
        if row.get(name) is not None:
            entry(row, name, float, f"{file}: step {row['step']}", least=-1e300, most=1e300)


def _check_owner(file: pathlib.Path, result: Mapping[str, Any], config: Config) -> None:
    """Raises FileError for a result that an earlier run in the same folder left behind."""
    for name in ("variant", "seed"):
        was, now = result.get(name), getattr(config, name)
        if was not in (None, now):
            raise FileError(f"{file}: its {name} is {was!r}, and that of the run {now!r}; evaluate again or remove it")


def _cost(path: pathlib.Path, config: Config, length: int) -> dict[str, Any] | None:
    """Parameters, streaming state and forward FLOPs of a token at `length`, from shapes alone."""
    if not (path / "data.json").exists():
        return None
    model = Model(config, load_vocab_size(str(path)))
    params = jax.eval_shape(model.init, jax.random.key(0))
    if not model.streams:
        return None
    state = state_bytes(config, jax.eval_shape(lambda: model.initial_state(1, length)))
    forms = [override(config, {"attention.implementation": "chunked"})] if linear_specs(config) else []
    attention = min(flops.attention_flops_per_token(form, length) for form in [config, *forms])
    per_token = attention + 2.0 * flops.matrix_parameters(config, params)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": sum(state.values()),
        "state_bytes_by_kind": state,
        "constant": model.streams_constant,
        "length": length,
        "flops_per_token": per_token,
    }


def _paired(labels: Sequence[str], sources: Sequence[tuple[pathlib.Path, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each evaluation against the first, or why that cannot be done."""
    paired = []
    for index, (label, source) in enumerate(zip(labels, sources, strict=True)):
        if index == 0:
            continue
        row: dict[str, Any] = {"label": label, "index": index}
        try:
            row["result"] = paired_difference(read_arrays(*sources[0]), read_arrays(*source))
        except (OSError, ValueError) as error:
            row["reason"] = str(error)
        except (KeyError, IndexError, TypeError) as error:
            row["reason"] = f"{source[0]}: its arrays are not those of an evaluation ({one_line(error)})"
        paired.append(row)
    return paired


def _differences(configs: Sequence[Config]) -> dict[str, list[Any]]:
    flat = [flatten(config) for config in configs]
    return {
        field: [values[field] for values in flat]
        for field in flat[0]
        if len({json.dumps(values[field], default=str) for values in flat}) > 1
        and not field.startswith(IGNORED_DIFFERENCES)
    }


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
