"""A command as several processes of this machine that find each other; each leaves what it printed in files."""

import pathlib
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any


class LocalProcesses:
    """`count` processes of one command, alive until they end or the block of `with` does.

    Args:
      command: of each; where there are several, the flags by which they find each other are appended.
      count: how many.
      folder: made if absent; output.N.txt and errors.N.txt there are what process N wrote.
      options: of subprocess.Popen.
    """

    def __init__(self, command: Sequence[str], count: int, folder: pathlib.Path, **options: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        together = [f"--coordinator_address=127.0.0.1:{_free_port()}", f"--num_processes={count}"]
        self._processes = []
        for index in range(count):
            place = [*together, f"--process_id={index}"] if count > 1 else []
            with open(folder / f"output.{index}.txt", "wb") as output, open(self._errors(index), "wb") as errors:
                pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": errors}
                self._processes.append(subprocess.Popen([*command, *place], **pipes, **options))

    def __enter__(self) -> "LocalProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def __len__(self) -> int:
        return len(self._processes)

    def kill(self, index: int) -> None:
        """kill -9."""
        self._processes[index].kill()

    def codes(self) -> list[int | None]:
        """The exit code of each, negative after a signal; None where it runs."""
        return [process.poll() for process in self._processes]

    def wait(self, seconds: float) -> list[int | None]:
        """The same, once all have ended or so much time has passed."""
        until = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < until:
            time.sleep(0.01)
        return self.codes()

    def errors(self, index: int) -> str:
        """What process `index` has written to standard error."""
        return self._errors(index).read_text(errors="replace")

    def _errors(self, index: int) -> pathlib.Path:
        return self._folder / f"errors.{index}.txt"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
