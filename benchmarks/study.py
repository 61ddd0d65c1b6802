"""The studies of RESULTS.md: runs what is missing of a sweep, and writes its table and figure.

    python -m benchmarks.study length_study [--root=runs/length_study]     hours; stopped, it goes on there
    python -m benchmarks.study state_recall | conformal_family | state_passing
    python -m benchmarks.study length_study --tables                         runs nothing

Ctrl-C and SIGTERM stop all runs, each with a checkpoint; the tables are then of the runs that are evaluated so far.
A run has one core, and so many run at once as there are cores: a second core saves a third of the time of a run of
this size (`python train.py --config=configs/figures/state_passing.py:sympow,zero --workdir=DIR
--config.num_train_steps=100`: 48 s under `taskset -c 0`, 32 s on both cores of an AMD processor, family 25, model 17,
commit 7af7f2b). docs/benchmarks/NAME.json has the command, the commits and loads of the machine of each call, and the
results; the table stands in RESULTS.md between `<!-- benchmarks.study: NAME -->` and `<!-- end -->`, the figure is
docs/NAME.png.
docs/benchmarks/NAME.tar.xz has the runs but for the arrays of their checkpoints: configs, losses, evaluations, digests.
A ROOT that is not there is made from it, so a study goes on on another machine too. What was evaluated on other data
(another Python has other sources) ends it with a line: without arrays it cannot be run again, and an empty ROOT starts
anew.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence

from benchmarks.all import FOLDER, RESULTS, ROOT, commit, machine
from sympow_jax.config import parse_points, parse_variants

SWEEPS = {
    "length_study": "--variants=all --seeds=0,1,2 --learning_rates=1e-3,3e-3,1e-2",
    "state_recall": "--points=all --seeds=0,1,2",
    "conformal_family": "--points=all --seeds=0,1,2",
    "state_passing": "--points=all --seeds=0,1,2",
}

_LARGE = (".npz", ".png")
_NAMES_ITS_FOLDER = "commit_success.txt"  # Orbax reads it on object stores alone


def sweep_command(name: str, root: str, share: str = "all") -> str:
    """The command of a study or a share of its variants or points, without the interpreter."""
    words = SWEEPS[name].replace("=all", f"={share}")
    return f"-m sympow_jax.sweep --config=configs/figures/{name}.py --root={root} {words}"


def shares(name: str, count: int) -> list[str]:
    """The variants or points of a study dealt out to `count` sweeps, as their flag has them."""
    points, path = "--points=all" in SWEEPS[name], str(ROOT / f"configs/figures/{name}.py")
    named = parse_points("all", (0,), [path]) if points else parse_variants("all", (0,))
    every = [each for each, _ in named]
    return [(";" if points else ",").join(every[start::count]) for start in range(min(count, len(every)))]


def measure(name: str, root: pathlib.Path) -> int:
    """Runs what is missing, and notes in ROOT/calls.json the commit and the load of the machine; the exit code."""
    root.mkdir(parents=True, exist_ok=True)
    calls = [*_calls(root), {"commit": commit(), "load": os.getloadavg()[0]}]
    (root / "calls.json").write_text(json.dumps(calls) + "\n")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    sweeps = [_sweep(name, root, share, {core}) for core, share in zip(cores, shares(name, len(cores)), strict=False)]
    return wait(sweeps)


def tables(name: str, root: pathlib.Path) -> int:
    """Writes ROOT/sweep.* of the runs that are evaluated; the exit code."""
    return subprocess.run([sys.executable, *sweep_command(name, str(root)).split(), "--tables"], cwd=ROOT).returncode


def wait(sweeps: Sequence[subprocess.Popen]) -> int:
    """Passes signals on to the sweeps until they have ended; the first exit code of theirs that is not 0."""

    def pass_on(number: int, _: object) -> None:
        for sweep in sweeps:
            sweep.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, pass_on)
    codes = [sweep.wait() for sweep in sweeps]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _sweep(name: str, root: pathlib.Path, share: str, cores: set[int]) -> subprocess.Popen:
    """In a session of its own: a terminal's Ctrl-C would come besides ours, and a second signal ends a run at once."""
    keep_to = functools.partial(os.sched_setaffinity, 0, cores) if hasattr(os, "sched_setaffinity") else None
    command = [sys.executable, *sweep_command(name, str(root), share).split()]
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=keep_to, start_new_session=True)


def _calls(root: pathlib.Path) -> list[dict]:
    notes = root / "calls.json"
    return json.loads(notes.read_text()) if notes.exists() else []


def pack(root: pathlib.Path, archive: pathlib.Path) -> None:
    """The folder's own files, and of each run that is evaluated all but arrays, figures and ROOT's path, sorted."""
    runs = [run for run in root.iterdir() if any(run.glob("eval/*.json"))]
    files = [path for path in root.glob("*") if path.is_file()] + [path for run in runs for path in run.rglob("*")]
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(files):
            name = path.relative_to(root)
            left_out = {"state", "tensorboard", _NAMES_ITS_FOLDER} & set(name.parts) or path.suffix in _LARGE
            if path.is_file() and not left_out:
                entry = tarfile.TarInfo(str(name))
                entry.size = path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(entry, file)


def unpack(archive: pathlib.Path, root: pathlib.Path) -> None:
    """The folder of a study from its archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")


def keep(name: str, root: pathlib.Path) -> None:
    """Copies what the sweep has written so far to docs/."""
    rows = json.loads((root / "sweep.json").read_text())
    kept = {
        "command": f"python -m benchmarks.study {name}",
        "sweep": f"python {sweep_command(name, f'runs/{name}')}",
        "machine": machine(),
        "calls": _calls(root),
        "runs": len(rows),
        "digests": sorted({row["data"]["digest"] for row in rows if "data" in row}),
        "table": (root / "sweep.md").read_text(),
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    pack(root, FOLDER / f"{name}.tar.xz")
    shutil.copyfile(root / "sweep.png", FOLDER.parent / f"{name}.png")


def section(name: str, kept: dict) -> str:
    """The commands, where they ran, the tables and the figure, as RESULTS.md has them."""
    commits = ", ".join(dict.fromkeys(call["commit"] for call in kept["calls"]))
    digests = f", held-out digest `{'`, `'.join(kept['digests'])}`" if kept["digests"] else ""
    where = f"{kept['runs']} runs, {kept['machine']}, commit {commits}{digests}:"
    figure = f"![{name}](docs/{name}.png)"
    return f"    {kept['command']}\n    {kept['sweep']}\n\n{where}\n\n{kept['table']}\n{figure}"


def with_section(text: str, name: str, kept: dict) -> str:
    """`text` with the section of a study where its marks are."""
    body = f"<!-- benchmarks.study: {name} -->\n\n{section(name, kept)}\n\n<!-- end -->"
    pattern = rf"<!-- benchmarks\.study: {name} -->.*?<!-- end -->"
    return re.sub(pattern, lambda _: body, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--root", type=pathlib.Path, default=None, help="folder of the runs; runs/NAME")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    root = (arguments.root or ROOT / "runs" / arguments.name).resolve()
    archive = FOLDER / f"{arguments.name}.tar.xz"
    if archive.exists() and not root.exists():
        unpack(archive, root)
    measured = 0 if arguments.tables else measure(arguments.name, root)
    written = tables(arguments.name, root)
    if (root / "sweep.json").exists():
        keep(arguments.name, root)
        kept = json.loads((FOLDER / f"{arguments.name}.json").read_text())
        RESULTS.write_text(with_section(RESULTS.read_text(), arguments.name, kept))
    sys.exit(measured or written)


if __name__ == "__main__":
    main()
