"""The benchmarks whose tables RESULTS.md has, one after another, in eight minutes on two idle cores.

    python -m benchmarks.all --torch=PYTHON            # measures, writes docs/benchmarks and the tables of RESULTS.md
    python -m benchmarks.all --torch=PYTHON --only=start,prefill
    python -m benchmarks.all --tables                  # the tables of RESULTS.md from docs/benchmarks

PYTHON is an interpreter with PyTorch, in an environment of its own (requirements-oracle.txt); without one, PyTorch's
columns are empty. docs/benchmarks/NAME.json has for each kind of machine the command, the commit, the load of the
machine before and after, and all rows, of its last call; the tables stand in RESULTS.md between
`<!-- benchmarks.all: NAME -->` and `<!-- end -->`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import decode, ops, start, train_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER, RESULTS = ROOT / "docs" / "benchmarks", ROOT / "RESULTS.md"


@dataclasses.dataclass(frozen=True)
class Part:
    """One call of a benchmark: its command, and the table of what it wrote."""

    command: str
    table: Callable[[Any], str]


_SHORT = "--case=softmax_rope,4,8,512 --case=conformal_sympow,4,8,512"
_BIASED = " ".join(f"--case={kernel},1,2048,4,64:blockwise" for kernel in ops.GATED_OR_BIASED)
PARTS = {
    "train_step": Part(f"benchmarks.train_step {_SHORT} --compile --rounds=9", train_step.table),
    "train_step_same_allocator": Part(f"benchmarks.train_step {_SHORT} --same_allocator --rounds=5", train_step.table),
    "train_step_long": Part(
        "benchmarks.train_step --case=conformal_sympow,4,1,16384 --case=conformal_sympow,4,1,32768 --rounds=2",
        train_step.table,
    ),
    "start": Part("benchmarks.start --rounds=3", start.table),
    "prefill": Part(
        "benchmarks.decode --variants=conformal_sympow,softmax_rope --positions=1000,32768 --prompts=512,2048,8192 "
        "--seconds=25",
        decode.table,
    ),
    "biases": Part(f"benchmarks.ops {_BIASED} --seconds=6", ops.over_softmax_table),
}


def measure(name: str, torch: str) -> dict:
    """Runs a part in processes of its own; returns what docs/benchmarks keeps of it."""
    words = PARTS[name].command.split()
    if torch and words[0] == "benchmarks.train_step":
        words.append(f"--torch={torch}")
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "rows.json")
        subprocess.run([sys.executable, "-m", *words, f"--output={output}"], cwd=ROOT, check=True)
        rows = json.loads(output.read_text())
    return {
        "command": f"python -m {PARTS[name].command}",
        "commit": commit(),
        "machine": machine(),
        "load": [before, os.getloadavg()[0]],
        "rows": rows,
    }


def machine() -> str:
    """Cores and processor: vendor, family and model where Linux tells, since names of virtual machines may not."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = [re.search(rf"^{field}\s*: (.*)$", text, flags=re.M) for field in ("vendor_id", "cpu family", "model")]
    if not all(found):
        return f"{os.cpu_count()} cores, {platform.machine()}"
    vendor, family, model = (match[1] for match in found if match)
    return f"{os.cpu_count()} cores, {vendor} family {family} model {model}"


def keep(name: str, kept: dict) -> None:
    """Writes a measurement in the place of the last one of such a machine."""
    path = FOLDER / f"{name}.json"
    others = [old for old in _kept(path) if old["machine"] != kept["machine"]]
    path.write_text(json.dumps([*others, kept], indent=1) + "\n")


def _kept(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def commit() -> str:
    """The short name of the commit, with a + where files are changed."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "sympow_jax", "benchmarks"]).returncode
    return name + "+" * bool(changed)


def section(name: str, kept: dict) -> str:
    """The command, where it ran, and the table, as RESULTS.md has them."""
    before, after = kept["load"]
    where = f"{kept['machine']}, load {before:.1f} before and {after:.1f} after, commit {kept['commit']}"
    return f"    {kept['command']}\n\n{where}:\n\n{PARTS[name].table(kept['rows'])}"


def with_tables(text: str) -> str:
    """`text` with the sections of all parts that docs/benchmarks holds, where their marks are."""
    for name in PARTS:
        sections = [section(name, kept) for kept in _kept(FOLDER / f"{name}.json")]
        if sections:
            body = "\n\n".join([f"<!-- benchmarks.all: {name} -->", *sections, "<!-- end -->"])
            text = re.sub(rf"<!-- benchmarks\.all: {name} -->.*?<!-- end -->", lambda _, b=body: b, text, flags=re.S)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="", help="an interpreter that has torch")
    parser.add_argument("--only", default=",".join(PARTS), help="names of parts")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: there is no part {unknown[0]!r}; give some of {', '.join(PARTS)}")
    for name in names * (not arguments.tables):
        print(f"\n{name}", flush=True)
        keep(name, measure(name, arguments.torch))
    RESULTS.write_text(with_tables(RESULTS.read_text()))


if __name__ == "__main__":
    main()
