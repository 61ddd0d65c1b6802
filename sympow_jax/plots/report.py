"""The report: one HTML page without network access, from what sympow_jax.report gathered."""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax.plots import panels, style
from sympow_jax.plots.heatmap import accuracy_heatmap
from sympow_jax.plots.tables import short_verdict

PUBLISHED = "conformal_sympow.json"
_PARTS = ("css", "js")


def report_page(data: Mapping[str, Any]) -> str:
    """The page as a string.

    Args:
      data: {"runs": [{"label", "folder", "training": {...}, "cost": {...} or None}], "evaluations": [{"label", "run",
        "result"}], "groups": [{"label", "members": [places in evaluations], "result":
        of seeds.over_seeds}], "paired": [{"label", "index", "result" or "reason"}], "biases": [{"label", "result"}],
        "remembrance": [{"label", "run", "result"}], "retrieval": [{"label", "title", "result"}],
        "config_differences": {"field": [value for each run]}, "settings": {"field": value} of a page of one run,
        "pages": {folder: address}}; made by sympow_jax.report.gather.
    """
    evaluations = data["evaluations"]
    labels = [group["label"] for group in data["groups"]]
    results = [group["result"] for group in data["groups"]]
    sections = [_summary(data), _length_section(results, labels)]
    sections += [_paired_section(data["paired"], labels, results), _remembrance_section(data)]
    sections += [_bias_section(data["biases"])]
    sections += [_cost_section(data), _training_section(data)]
    sections += [_retrieval_section(data["retrieval"]), _published_section(results)]
    sections += [_config_section(data), _provenance_section(evaluations), _runs_section(data)]
    styles, script = (importlib.resources.files("sympow_jax.plots").joinpath(f"page.{x}").read_text() for x in _PARTS)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script runs on the page
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    count = len(data["runs"])
    title = f"Length generalisation of {f'{count} runs' if count != 1 else html.escape(data['runs'][0]['label'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{styles}</style></head><body><main><h1>{title}</h1>"
        "<p>Losses are nats per token on held-out documents; intervals are 95% bootstraps over source documents; where "
        "several runs differ in their seed alone, the mean and Student's 95% interval over seeds.</p>"
        f"{_legend(data)}{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def _indices(data: Mapping[str, Any]) -> list[int]:
    """The line style of each evaluation, which is that of its group."""
    found = [0] * len(data["evaluations"])
    for index, group in zip(_group_indices(data), data["groups"], strict=True):
        for member in group["members"]:
            found[member] = index
    return found


def _group_indices(data: Mapping[str, Any]) -> list[int]:
    return style.line_indices([group["result"] for group in data["groups"]])


def _legend_entries(data: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Colour index and label by run; a run has the colour of its first evaluation, others come after all of those."""
    entries: dict[str, tuple[int, str]] = {}
    indices = _indices(data)
    for index, entry in zip(indices, data["evaluations"], strict=True):
        entries.setdefault(entry["run"], (index, entry["label"]))
    missing = [run for run in data["runs"] if run["folder"] not in entries]
    otherwise = {entry["run"] for name in ("retrieval", "biases", "remembrance") for entry in data[name]}
    for index, run in enumerate(missing, start=max(indices, default=-1) + 1):
        entries[run["folder"]] = (index, run["label"] + " (not evaluated)" * (run["folder"] not in otherwise))
    return entries


def _legend(data: Mapping[str, Any]) -> str:
    indices = _indices(data)
    shown = [(index, group["label"]) for index, group in zip(_group_indices(data), data["groups"], strict=True)]
    shown += [entry for entry in _legend_entries(data).values() if entry[0] not in indices]
    items = []
    for index, label in shown:
        looks = style.line_style(index)
        dash = "" if looks["linestyle"] == "-" else f' stroke-dasharray="{",".join(map(str, looks["linestyle"][1]))}"'
        line = f'<line x1="0" y1="6" x2="30" y2="6" stroke="{looks["color"]}" stroke-width="3"{dash}/>'
        items.append(f'<span><svg viewBox="0 0 30 12">{line}</svg>{html.escape(label)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"


def _figures(figures: Sequence[tuple[str, str]], kind: str = "") -> str:
    def item(svg: str, caption: str) -> str:
        return f'<figure class="{kind}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'

    items = [item(svg, caption) for svg, caption in figures]
    return f'<div class="figures">{"".join(items)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table in a box that scrolls sideways; cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table {kind}">{inner}</div>'


def _number(value: float | None, interval: Sequence[float | None] | None = None, form: str = ".4f") -> str:
    if value is None:
        return "-"
    text = f"{value:{form}}"
    if interval is None or None in interval:
        return text
    return f"{text}<small>{interval[0]:{form}} to {interval[1]:{form}}</small>"


def _summary(data: Mapping[str, Any]) -> str:
    header = ["run", "trained at", "step", "gained from context", "loss there"]
    header += ["longest tested", "loss there", "change", "remembered", "beyond training"]
    rows = []
    for entry in data["groups"]:
        result = entry["result"]
        change, same = result["same_target_change"], result["same_target"]
        start = change["context"].index(change["from_context"])
        rows.append(
            [
                html.escape(entry["label"]),
                f"{result['train_length']:,}",
                f"{result['step']:,}" if result.get("step") is not None else "-",
                _gain(result, change["from_context"]),
                _number(same[start]["nll"], same[start]["ci95"]),
                f"{same[-1]['context']:,}",
                _number(same[-1]["nll"], same[-1]["ci95"]),
                _number(change["difference"][-1], change["ci95"][-1], "+.4f") if start < len(same) - 1 else "-",
                _remembered(result),
                short_verdict(result),
            ]
        )
    missing = sorted({run["folder"] for run in data["runs"]} - {entry["run"] for entry in data["evaluations"]})
    note = "Loss on the same final tokens of every document, given the training length and the longest context tested. "
    note += "Remembered: the share of what context gained up to the training length that is left at the longest. "
    note += "A click on a column's head sorts by it."
    if missing:
        note += f" Not evaluated yet: {', '.join(missing)}."
    return _section("Summary", note, table(header, rows, "wide sortable"))


def _gain(result: Mapping[str, Any], trained: int) -> str:
    """What the context up to the trained one is worth: see evals.length_summary."""
    found = [row for row in result.get("gained_from_context") or () if row["to_context"] == trained]
    return _number(found[0]["gain"], found[0]["ci95"], "+.4f") if found else "-"


def _remembered(result: Mapping[str, Any]) -> str:
    """The share of the gain from context that is left at the longest context, in percent."""
    found = result.get("remembered_share")
    if not found or found["share"] is None:
        return "-"
    percent = [None if end is None else 100 * end for end in found["ci95"]]
    return _number(100 * found["share"], percent, ".1f")


def _length_section(results: Sequence[Mapping], labels: Sequence[str]) -> str:
    if not results:
        return ""
    figures = [
        (panels.same_target(results, labels), "The curve that decides: the same targets under growing context."),
        (panels.contextwise(results, labels), "Documents read once from their start; log-spaced bins."),
    ]
    text = "Grey ground: longer than any training context. A curve says nothing beyond its last point."
    return _section("Loss and context", text, _figures(figures))


def _paired_section(paired: Sequence[Mapping], labels: Sequence[str], results: Sequence[Mapping]) -> str:
    if not paired:
        return ""
    usable = [entry for entry in paired if entry.get("result")]
    contexts = sorted({row["context"] for entry in usable for row in entry["result"]["same_target"]})
    heads, rows = [f"{context:,}" for context in contexts] or [""], []
    for entry in paired:
        if not entry.get("result"):
            rows.append([html.escape(entry["label"]), html.escape(entry["reason"]), *[""] * (len(heads) - 1)])
            continue
        found = {row["context"]: row for row in entry["result"]["same_target"]}
        cells = [_number(found[c]["difference"], found[c]["ci95"], "+.4f") if c in found else "-" for c in contexts]
        rows.append([html.escape(entry["label"]), *(cells or ["-"])])
    body = table([f"minus {html.escape(labels[0])}", *heads], rows)
    styles = style.line_indices(results)
    drawn = [entry for entry in usable if panels.has_positions(entry["result"])]
    curves = [(styles[entry["index"]], entry["result"]) for entry in drawn]
    if curves:
        trained = [int(result["train_length"]) for result in results]
        svg = panels.paired(curves, labels[0], trained)
        body = _figures([(svg, "Below zero: better than the first run. What makes a document hard cancels.")]) + body
    text = (
        "Same-target loss minus that of the first run on the same documents, with intervals of the paired difference."
    )
    return _section("Paired differences", text, body)


def _remembrance_section(data: Mapping[str, Any]) -> str:
    """Every run in its colour; a run that was asked several times has as many curves of it."""
    if not data["remembrance"]:
        return ""
    colours = _legend_entries(data)
    entries = [(colours[entry["run"]][0], entry["label"], entry["result"]) for entry in data["remembrance"]]
    figures = [
        (
            panels.remembrance(entries),
            "What the first tokens are worth to the last targets, in paired differences.",
        ),
        (panels.variation(entries), "How much those tokens count at all: 0 is nothing, 1 another prediction."),
    ]
    figures += [
        (
            panels.norms(result, f"{label}: state (solid), normaliser (dashed)"),
            "One line a layer, dark to light by depth.",
        )
        for _, label, result in entries
        if result["state_norms"]
    ]
    lengths = "; ".join(f"{label}: the last {r['num_targets']} of {r['length']:,}" for _, label, r in entries)
    text = (
        "What the loss of the last targets rises by when earlier tokens are replaced by those of another document: 0 "
        "is forgotten, below 0 does harm. Far tokens that move the predictions without helping, and states larger than "
        f"any within the trained length, explain a collapse. Targets: {lengths}."
    )
    return _section("Remembrance and states", text, _figures(figures))


def _bias_section(biases: Sequence[Mapping]) -> str:
    if not biases:
        return ""
    figures = [
        (panels.biases(entry["result"], entry["label"]), f"At query position {entry['result']['query_position']:,}.")
        for entry in biases
    ]
    text = (
        "What a key loses by its distance: additive bias plus distance times the mean log gate over held-out text. "
        "0 is no preference, -5 leaves less than 1% of the weight; one line a head."
    )
    return _section("Biases and gates", text, _figures(figures))


def _state(cost: Mapping[str, Any]) -> str:
    """Bytes of a state, and of each kind of layers where there are several."""
    kinds = cost["state_bytes_by_kind"]
    parts = ", ".join(f"{html.escape(name)} {style.quantity(size, 'B')}" for name, size in kinds.items())
    return style.quantity(cost["state_bytes"], "B") + (f"<br><small>{parts}</small>" if len(kinds) > 1 else "")


def _cost_section(data: Mapping[str, Any]) -> str:
    costs = {run["folder"]: run["cost"] for run in data["runs"] if run["cost"]}
    rows, state, flops = [], [], []
    for index, entry in zip(_indices(data), data["evaluations"], strict=True):
        cost = costs.get(entry["run"])
        if cost is None:
            continue
        loss = entry["result"]["same_target"][-1]["nll"]
        state.append((index, cost["state_bytes"], loss))
        flops.append((index, cost["flops_per_token"], loss))
        rows.append(
            [
                html.escape(entry["label"]),
                f"{cost['parameters']:,}",
                _state(cost),
                "constant" if cost["constant"] else f"at {cost['length']:,} tokens",
                style.quantity(cost["flops_per_token"]),
                _number(loss),
            ]
        )
    if not rows:
        return ""
    figures = [
        (panels.cost(state, "state of one stream", "B"), "Linear kernels keep a constant state, softmax a cache."),
        (
            panels.cost(flops, "forward FLOPs per token", ""),
            "Exact products at the longest context evaluated, by the cheaper form of a kernel.",
        ),
    ]
    header = ["run", "parameters", "state", "", "FLOPs per token", "loss at the longest context"]
    text = "What a stream holds in memory, and what a token costs, against the loss."
    return _section("Cost", text, _figures(figures) + table(header, rows))


def _training_section(data: Mapping[str, Any]) -> str:
    names = _legend_entries(data)
    curves = [(names[run["folder"]][0], run["training"]) for run in data["runs"] if run["training"]["loss"]]
    if not curves:
        return ""
    svg = panels.training(curves)
    text = "Training loss misranks models trained at different lengths: compare them by the curves above."
    return _section("Training", text, _figures([(svg, "From metrics.jsonl, averaged over neighbouring rows.")]))


def _retrieval_section(retrieval: Sequence[Mapping]) -> str:
    if not retrieval:
        return ""
    figures = []
    for entry in retrieval:
        figure = accuracy_heatmap(entry["result"], title=f"{entry['label']}: {entry['title']}")
        figure.patch.set_alpha(0)
        caption = f"{entry['result']['num_examples']} examples a cell; dashed: training length."
        figures.append((style.svg(figure), caption))
    return _section("Retrieval", "Percent of answer tokens that are exactly right.", _figures(figures, "small"))


def _published_section(results: Sequence[Mapping]) -> str:
    stores = [str(result["data"]["store"]).lower() for result in results]
    ours = [
        (index, result)
        for index, result, store in zip(style.line_indices(results), results, stores, strict=True)
        if "longcrawl64" in store
    ]
    if not ours:
        return ""
    text = importlib.resources.files("sympow_jax.plots").joinpath("published", PUBLISHED).read_text()
    content = json.loads(text)
    svg = panels.published(content["contextwise_train_16384"][0]["series"], ours)
    return _section("Published curves", f"Source: {content['source']}", _figures([(svg, "LongCrawl64 runs only.")]))


def _config_section(data: Mapping[str, Any]) -> str:
    differences = data["config_differences"]
    if data.get("settings"):
        rows = [[f"<code>{html.escape(k)}</code>", html.escape(json.dumps(v))] for k, v in data["settings"].items()]
        return _section("Config", "Every setting of the run.", table(["setting", "value"], rows, "words"))
    if not differences:
        return ""
    header = ["setting", *[html.escape(run["label"]) for run in data["runs"]]]
    rows = [
        [f"<code>{html.escape(field)}</code>", *[html.escape(json.dumps(value)) for value in values]]
        for field, values in differences.items()
    ]
    return _section("Configs", "Settings in which the runs differ; all others are equal.", table(header, rows))


def _runs_section(data: Mapping[str, Any]) -> str:
    """Links to the pages of the runs, where they are written."""
    pages = data.get("pages") or {}
    if not pages:
        return ""
    losses = {run["folder"]: "-" for run in data["runs"]}
    for entry in data["evaluations"]:
        losses[entry["run"]] = _number(entry["result"]["same_target"][-1]["nll"])
    rows = [
        [f'<a href="{html.escape(pages[run["folder"]])}">{html.escape(run["label"])}</a>', losses[run["folder"]]]
        for run in data["runs"]
    ]
    text = "A page of each run: its curves, losses in training and every setting."
    return _section("Runs", text, table(["run", "loss at the longest context"], rows, "sortable"))


def _provenance_section(evaluations: Sequence[Mapping]) -> str:
    if not evaluations:
        return ""
    rows = []
    for entry in evaluations:
        result = entry["result"]
        data = result["data"]
        rows.append(
            [
                html.escape(entry["label"]),
                f"<code>{html.escape(entry['run'])}</code>",
                html.escape(f"{data['store']} ({str(data['digest'])[:12]})"),
                f"{result['num_documents']} from {result['num_sources']} sources",
                html.escape(f"{result.get('dtype')}; {data['bos_rule']}"),
            ]
        )
    header = ["run", "folder", "store (digest)", "documents", "how"]
    return _section(
        "What was evaluated", "Curves compare best on the same store and documents.", table(header, rows, "words")
    )
