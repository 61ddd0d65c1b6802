"""One HTML page over several runs: python -m sympow_jax.report RUN [RUN ...] --output=FILE.html [--pages]

Reads config.json, metrics.jsonl and eval/*.json, *.npz of each workdir; loads no checkpoint and needs no network. Runs
that differ in their seed alone are one line with a band; the first is what the paired differences are taken against.
--pages writes a page of each run as well, into the folder FILE-runs beside it, which the page links to.
"""

import json
import logging
import pathlib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from sympow_jax.command_line import run_program, split_flags
from sympow_jax.config import Config, ConfigError, flatten
from sympow_jax.evals.files import inputs_digest, read_arrays
from sympow_jax.evals.paired import mean_of_seeds, paired_difference
from sympow_jax.evals.result_shape import read_result
from sympow_jax.files import FileError, entry, one_line, write_text_atomic
from sympow_jax.models.cost import stream_cost
from sympow_jax.plots.report import report_page
from sympow_jax.plots.seeds import comparable, grouped, over_seeds
from sympow_jax.plots.style import run_labels
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.training.run_files import load_config, load_vocab_size

IGNORED_DIFFERENCES = ("logging.", "checkpoint.", "data.prefetch", "data.num_threads")

log = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    folders = [argument for argument in argv if not argument.startswith("--")]
    flags = [argument for argument in argv if argument.startswith("--")]
    own, _ = split_flags(flags, ("output",), switches=("pages",))
    if not folders:
        raise ConfigError("no run given: python -m sympow_jax.report RUN [RUN ...] --output=FILE.html")
    output = own.get("output", "report.html")
    if pathlib.Path(output).suffix not in (".html", ".htm") or pathlib.Path(output).is_dir():
        raise ConfigError(f"--output = {output!r}: the page is a file; give it a name that ends in .html")
    data = gather(folders)
    if "pages" in own:
        data["pages"] = _write_pages(data, pathlib.Path(output))
    page = report_page(data)
    write_text_atomic(output, page)
    print(f"report: {output} ({len(page.encode()) / 1e6:.2f} MB)")
    return 0


def _write_pages(data: Mapping[str, Any], output: pathlib.Path) -> dict[str, str]:
    """A page of each run in the folder OUTPUT-runs; returns the addresses, as OUTPUT has them, by the runs' folders."""
    pages = output.with_name(f"{output.stem}-runs")
    pages.mkdir(parents=True, exist_ok=True)
    addresses = {}
    for number, run in enumerate(data["runs"], start=1):
        name = f"{number}-{re.sub('[^A-Za-z0-9]+', '-', run['label']).strip('-')[-80:]}.html"
        addresses[run["folder"]] = f"{pages.name}/{name}"
        write_text_atomic(pages / name, report_page(_of_run(data, run)))
    return addresses


def _of_run(data: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What `gather` would find of this run alone, and every setting of it."""
    own = {
        name: [entry for entry in data[name] if entry["run"] == run["folder"]]
        for name in ("evaluations", "retrieval", "biases", "remembrance")
    }
    groups = [
        {"label": entry["label"], "members": [place], "result": entry["result"]}
        for place, entry in enumerate(own["evaluations"])
    ]
    alone = {"runs": [run], "groups": groups, "paired": [], "config_differences": {}, "settings": run["settings"]}
    return own | alone


def gather(folders: Sequence[str]) -> dict[str, Any]:
    """What the page shows of these workdirs, as plain data (see plots.report.report_page).

    Raises:
      ConfigError: a folder is no workdir.
    """
    runs, evaluations, retrieval, biases, remembrance, configs, arrays, keys = [], [], [], [], [], [], [], []
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
                evaluations.append({"run": folder, "name": file.stem, "result": result})
                arrays.append((file, result))
                keys.append((file.stem, _but_seed(config), comparable(result)))
            elif "remembrance" in result:
                remembrance.append({"run": folder, "name": file.stem, "result": result})
            elif "accuracy" in result:
                retrieval.append({"run": folder, "title": result["task"], "result": result})
            elif "query_position" in result and result.get("inputs", "") not in {"", *made}:
                log.warning("%s is left out: it is of another evaluation than the results beside it", file)
            elif "query_position" in result:
                biases.append({"run": folder, "result": result})
        longest = max([config.data.seq_len, *(r["lengths"][-1]["length"] for _, r in found if "lengths" in r)])
        configs.append(config)
        cost, settings = _cost(path, config, longest), flatten(config)
        runs.append({"folder": folder, "training": _training(path), "cost": cost, "settings": settings})
    of_runs = [{"variant": config.variant, "seed": config.seed} for config in configs]
    names = _distinct(of_runs, [(folder, "") for folder in folders])
    by_folder = dict(zip(folders, names, strict=True))
    for run in runs:
        run["label"] = by_folder[run["folder"]]
    for shown in retrieval + biases:
        shown["label"] = by_folder[shown["run"]]
    for several in (evaluations, remembrance):
        labels = _distinct([shown["result"] for shown in several], [_place(shown) for shown in several])
        for shown, label in zip(several, labels, strict=True):
            shown["label"] = label
    groups = _groups(evaluations, keys)
    return {
        "runs": runs,
        "evaluations": evaluations,
        "groups": groups,
        "paired": _paired(groups, arrays),
        "biases": biases,
        "remembrance": remembrance,
        "retrieval": retrieval,
        "config_differences": _differences(configs),
    }


def _groups(evaluations: Sequence[Mapping[str, Any]], keys: Sequence[Hashable]) -> list[dict[str, Any]]:
    """Evaluations of runs that differ in their seed alone, as one result each; see plots.seeds.over_seeds."""
    members = grouped(keys, [entry["result"].get("seed") for entry in evaluations])
    results = [over_seeds([evaluations[place]["result"] for place in places]) for places in members]
    labels = _distinct(results, [_place(evaluations[places[0]]) for places in members])
    return [
        {"label": label, "members": places, "result": result}
        for label, places, result in zip(labels, members, results, strict=True)
    ]


def _but_seed(config: Config) -> str:
    kept = {k: v for k, v in flatten(config).items() if k != "seed" and not k.startswith(IGNORED_DIFFERENCES)}
    return json.dumps(kept, default=str)


def _place(shown: Mapping[str, Any]) -> tuple[str, str]:
    return shown["run"], shown["name"]


def _distinct(results: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of runs; where two would be equal with the folder's name, its path, or that of the evaluation besides.

    Args:
      results: of the runs.
      places: (folder, name of the evaluation) of each.
    """
    labels = shown = run_labels(results)
    for form in ("{0.name}", "{0}", "{0.name}, {1}", "{0}, {1}"):
        told = [form.format(pathlib.Path(folder), name) for folder, name in places]
        pairs = zip(labels, told, strict=True)
        shown = [label if labels.count(label) == 1 else f"{label} [{where}]" for label, where in pairs]
        if len(set(shown)) == len(shown):
            break
    return shown


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
    return stream_cost(config, load_vocab_size(str(path)), length) if (path / "data.json").exists() else None


def _paired(groups: Sequence[Mapping[str, Any]], files: Sequence[tuple[pathlib.Path, Any]]) -> list[dict[str, Any]]:
    """Each group against the first, the mean over its seeds document by document, or why that cannot be done."""

    def arrays(group: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return mean_of_seeds([read_arrays(*files[member]) for member in group["members"]])

    paired = []
    for index, group in enumerate(groups):
        if index == 0:
            continue
        row: dict[str, Any] = {"label": group["label"], "index": index}
        try:
            row["result"] = paired_difference(arrays(groups[0]), arrays(group))
        except (OSError, ValueError) as error:
            row["reason"] = str(error)
        except (KeyError, IndexError, TypeError) as error:
            row["reason"] = (
                f"{files[group['members'][0]][0]}: its arrays are not those of an evaluation ({one_line(error)})"
            )
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
