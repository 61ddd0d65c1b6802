"""Applies each one-line change of table.txt to a copy of the tree and expects the named tests to go red.

    python -m tests.mutants.run [WORD ...]     all, or those whose file, change or tests contain one of the words

Exit code 1 when a change survives, cannot be applied (its text no longer occurs exactly once), breaks more than the
tests (an import error, a hang), or when the tests are not green without it. Where words are given the latter is looked
at first; for the whole table it is left to `make test`, which .ci/run has before it.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.mutants.server import OUTPUT

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = pathlib.Path(__file__).with_name("table.txt")
WORKERS = 2
SECONDS, SECONDS_OF_ALL = 180, 900  # of the tests of a row, and of all of them without a change
GREEN, RED = "0", "1"  # exit codes of pytest; others are errors of collection or usage


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One row: in `file`, `old` becomes `new`, and one of `tests` must fail."""

    file: str
    tests: tuple[str, ...]
    old: str
    new: str

    def apply(self, tree: pathlib.Path) -> str:
        """Changes the file and returns what it was.

        Raises:
          ValueError: the text does not occur exactly once.
        """
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"occurs {text.count(self.old)} times, not once")
        path.write_text(text.replace(self.old, self.new))
        return text


def read_table(text: str) -> list[Mutant]:
    """Rows of three lines, FILE TEST [TEST ...], `- OLD` and `+ NEW`, parted by blank lines; # begins a comment."""
    mutants = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if not lines:
            continue
        head, old, new = lines
        file, *tests = head.split()
        if not (tests and old.startswith("- ") and new.startswith("+ ")):
            raise ValueError(f"{TABLE.name}: cannot read the row {head!r}")
        mutants.append(Mutant(file, tuple(tests), old[2:], new[2:]))
    return mutants


def copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """The tree without what git ignores, and with its cache of compiled programs."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", ".venv*", ".cache", "runs", "build", "out"))
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    (target / ".cache").symlink_to(cache)


class Worker:
    """A copy of the tree, and a process that runs tests in it (server.py)."""

    def __init__(self, tree: pathlib.Path):
        copy_tree(ROOT, tree)
        self.tree = tree
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.mutants.server"]
        self.server = subprocess.Popen(
            command, cwd=tree, env=environment, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, tests: Sequence[str], seconds: float = SECONDS) -> tuple[str, str]:
        """pytest's exit code or "timeout", and what it printed last."""
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(f"{seconds} {' '.join(tests)}\n")
        code = self.server.stdout.readline().strip()
        return code, (self.tree / OUTPUT).read_text(errors="replace")[-3000:] if code else "the server of tests ended"

    def judge(self, mutant: Mutant) -> str:
        """ "killed", or what is wrong."""
        path = self.tree / mutant.file
        before = path.stat()
        try:
            text = mutant.apply(self.tree)
        except ValueError as error:
            return str(error)
        code, output = self.run(mutant.tests)
        path.write_text(text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its bytecode is valid again
        return {GREEN: "SURVIVED", RED: "killed"}.get(code, f"pytest: {code}\n{output}")

    def close(self) -> None:
        """Ends the process."""
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


def main(words: list[str]) -> int:
    """Runs the chosen rows; prints one line each."""
    started = time.perf_counter()
    chosen = [m for m in read_table(TABLE.read_text()) if not words or any(w in repr(m) for w in words)]
    tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers = [Worker(pathlib.Path(folder, str(number))) for number in range(WORKERS)]
        for worker in workers:
            stack.callback(worker.close)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WORKERS))
        parts = [part for number in range(WORKERS) if (part := tests[number::WORKERS])] if words else []
        for code, output in pool.map(Worker.run, workers, parts, [SECONDS_OF_ALL] * WORKERS):
            if code != GREEN:
                print(f"the tests are not green without a change:\n{output}")
                return 1
        green = f"{len(tests)} tests or files of tests are" if words else "all tests were to be"
        print(f"{green} green, {time.perf_counter() - started:.0f} s", flush=True)
        idle = queue.SimpleQueue[Worker]()
        for worker in workers:
            idle.put(worker)

        def work(mutant: Mutant) -> tuple[str, float]:
            worker, begin = idle.get(), time.perf_counter()
            try:
                return worker.judge(mutant), time.perf_counter() - begin
            finally:
                idle.put(worker)

        alive = 0
        for mutant, (verdict, seconds) in zip(chosen, pool.map(work, chosen), strict=True):
            alive += verdict != "killed"
            print(f"{verdict:9} {seconds:4.0f} s  {mutant.file}: {mutant.old} -> {mutant.new}", flush=True)
    files = len({mutant.file for mutant in chosen})
    print(f"{len(chosen) - alive} of {len(chosen)} killed, in {files} files, {time.perf_counter() - started:.0f} s")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
