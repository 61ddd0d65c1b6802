"""Applies each one-line change of table.txt to a copy of the tree and expects the named tests to go red.

    python -m tests.mutants.run [WORD ...]     all, or those whose file, change or tests contain one of the words

Exit code 1 when a change survives, cannot be applied (its text no longer occurs exactly once), breaks more than the
tests (an import error, a hang), or when the tests are not green without it.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = pathlib.Path(__file__).with_name("table.txt")
WORKERS = 2
SECONDS, SECONDS_OF_ALL = 180, 900  # of the tests of a row, and of all of them without a change
GREEN, RED = 0, 1  # exit codes of pytest; others are errors of collection or usage


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


def run_tests(tree: pathlib.Path, tests: tuple[str, ...], seconds: float = SECONDS) -> tuple[int, str]:
    """pytest's exit code, and what it printed last."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout[-2000:] + done.stderr[-1000:]


def judge(mutant: Mutant, tree: pathlib.Path) -> str:
    """ "killed", or what is wrong."""
    path = tree / mutant.file
    before = path.stat()
    try:
        text = mutant.apply(tree)
    except ValueError as error:
        return str(error)
    try:
        code, output = run_tests(tree, mutant.tests)
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} s"
    finally:
        path.write_text(text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its bytecode is valid again
    return {GREEN: "SURVIVED", RED: "killed"}.get(code, f"pytest exit code {code}:\n{output}")


def main(words: list[str]) -> int:
    """Runs the chosen rows; prints one line each."""
    started = time.perf_counter()
    chosen = [m for m in read_table(TABLE.read_text()) if not words or any(w in repr(m) for w in words)]
    tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(WORKERS):
            trees.put(pathlib.Path(folder, str(number)))
            copy_tree(ROOT, pathlib.Path(folder, str(number)))
        parts = [part for number in range(WORKERS) if (part := tests[number::WORKERS])]
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            for code, output in pool.map(run_tests, [*trees.queue], parts, [SECONDS_OF_ALL] * WORKERS):
                if code != GREEN:
                    print(f"the tests are not green without a change:\n{output}")
                    return 1
        print(f"{len(tests)} tests or files of tests are green, {time.perf_counter() - started:.0f} s", flush=True)

        def work(mutant: Mutant) -> tuple[str, float]:
            tree, begin = trees.get(), time.perf_counter()
            try:
                return judge(mutant, tree), time.perf_counter() - begin
            finally:
                trees.put(tree)

        alive = 0
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            for mutant, (verdict, seconds) in zip(chosen, pool.map(work, chosen), strict=True):
                alive += verdict != "killed"
                print(f"{verdict:9} {seconds:4.0f} s  {mutant.file}: {mutant.old} -> {mutant.new}", flush=True)
    files = len({mutant.file for mutant in chosen})
    print(f"{len(chosen) - alive} of {len(chosen)} killed, in {files} files, {time.perf_counter() - started:.0f} s")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
