"""Runs pytest again and again in forks of one process that has imported the libraries, which takes seconds.

    python -m tests.mutants.server      in the tree whose tests it runs

Each line of standard input, SECONDS TEST [TEST ...], is answered by a line, the exit code, or "timeout"; what pytest
printed is in OUTPUT then. The project itself is imported by each fork, since its files change.
"""

import importlib
import os
import signal
import sys
import time

LIBRARIES = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "ml_collections", "pytest")
OUTPUT = "pytest.log"
OPTIONS = ("-x", "-p", "no:cacheprovider", "-m", "not slow")


def main() -> None:
    """Serves until standard input ends."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # as tests/conftest.py, which comes after the import
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        seconds, *tests = line.split()
        print(run(tests, float(seconds)), flush=True)


def run(tests: list[str], seconds: float) -> str:
    """pytest's exit code, or "timeout"."""
    child = os.fork()
    if child == 0:
        pytest_and_exit(tests)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def pytest_and_exit(tests: list[str]) -> None:
    """In the child: a process group of its own, so that what it starts ends with it."""
    os.setpgid(0, 0)
    log = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = importlib.import_module("pytest").main([*OPTIONS, *tests])
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
