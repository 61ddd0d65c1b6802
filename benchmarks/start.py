"""Seconds from the launch of train.py to the row of its first step, and of what answers without training.

    python -m benchmarks.start [--rounds=3] [--output=start.json]

The quickstart of conformal_sympow with its corpus present: cold, without compiled programs of earlier runs, and warm.
The cache is a temporary one. Processes wait for nothing else; medians.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = ["--config=configs/quickstart.py:conformal_sympow", "--config.logging.every_steps=1"]
STEPS += ["--config.num_train_steps=3", "--config.evaluation.every_steps=0"]
ANSWERS = {"--list": ["--list"], "a misspelt flag": ["--confg=x"]}


def seconds_to_first_row(cache: pathlib.Path) -> float:
    """Of one run in a workdir of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder, "run", "metrics.jsonl")
        command = [sys.executable, "train.py", *STEPS, f"--workdir={rows.parent}"]
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.DEVNULL
        )
        while not (rows.exists() and rows.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        if process.wait():
            raise SystemExit("train.py failed; its error is above")
    return seconds


def seconds_to_answer(flags: list[str]) -> float:
    """Of a command that trains nothing."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - begin


def measure(rounds: int) -> list[dict]:
    """All starts, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ("cold", "warm", *ANSWERS)}
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder)
        seconds_to_first_row(cache)  # makes the corpus
        for _ in range(rounds):
            shutil.rmtree(cache / "sympow_jax" / "xla")
            times["cold"].append(seconds_to_first_row(cache))
            times["warm"].append(seconds_to_first_row(cache))
            for name, flags in ANSWERS.items():
                times[name].append(seconds_to_answer(flags))
    return [{"start": name, "median": statistics.median(values), "seconds": values} for name, values in times.items()]


def table(rows: list[dict]) -> str:
    """Seconds, as Markdown."""
    names = {"cold": "first step, cold", "warm": "first step, warm"}
    lines = ["| launch to | seconds (median) |", "|---|---|"]
    return "\n".join([*lines, *(f"| {names.get(r['start'], r['start'])} | {r['median']:.2f} |" for r in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write all rows as JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    print(table(rows))
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
