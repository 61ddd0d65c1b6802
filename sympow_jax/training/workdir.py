"""The run's folder: atomic JSON files, and a lock so that two runs never write the same folder.

Nothing found in a workdir is executed or unpickled: it is JSON, zarr and text.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

LOCK_NAME = ".lock"


class WorkdirError(RuntimeError):
    """A file of the workdir is missing, damaged or held by another run; the message is one line."""


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON so that `path` holds the old or the new contents, whatever happens in between."""
    path = pathlib.Path(path)
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_text_atomic(path, text)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to a temporary file beside `path`, flushes it to the disk and renames it into place."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; a missing or damaged one is a WorkdirError that names it."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkdirError(f"{path} does not exist; is this the --workdir of a run?") from None
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({_one_line(error)}); restore it from a copy") from None


class WorkdirLock:
    """Holds a workdir for one run: `with WorkdirLock(workdir): ...`; raises WorkdirError when another run has it.

    The holder keeps a POSIX record lock on `<workdir>/.lock`, which the kernel drops when the process ends, however it
    ends, so a killed run leaves nothing to clean. The file says who holds it (host, pid, start time). Where a
    network file system does not carry record locks between hosts, a heartbeat decides: the holder touches the
    file every `heartbeat` seconds, and a run on another host takes over once three of them have been missed.
    Only process 0 of a multi-process run takes the lock.
    """

    def __init__(self, workdir: str | os.PathLike, *, heartbeat: float = 10.0):
        self.path = pathlib.Path(workdir).resolve() / LOCK_NAME
        self._heartbeat = heartbeat
        self._file: int | None = None
        self._released = threading.Event()

    _held_here: set[pathlib.Path] = set()  # record locks do not exclude a second holder in the same process

    def acquire(self) -> "WorkdirLock":
        """Takes the lock or raises WorkdirError."""
        if self.path in self._held_here:
            raise WorkdirError(f"{self.path.parent} is already in use by this process")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WorkdirError(f"--workdir={self.path.parent} cannot be written ({_one_line(error)})") from None
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._refuse(_read_holder(descriptor))
            holder = _read_holder(descriptor)
            if holder and holder.get("host") != socket.gethostname() and self._is_beating(descriptor):
                self._refuse(holder)
            me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._file = descriptor
        self._held_here.add(self.path)
        threading.Thread(target=self._beat, name="workdir-lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Gives the folder back; does nothing when the lock is not held."""
        if self._file is None:
            return
        self._released.set()
        self._held_here.discard(self.path)
        descriptor, self._file = self._file, None
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)

    def __enter__(self) -> "WorkdirLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refuse(self, holder: Mapping[str, Any]) -> None:
        known = {"host": "unknown", "pid": "unknown", "started": "unknown"} | dict(holder)
        raise WorkdirError(
            f"--workdir={self.path.parent} is in use by another run (host {known['host']}, pid {known['pid']},"
            f" since {known['started']}); wait for it, stop it, or choose another folder"
        )

    def _is_beating(self, descriptor: int) -> bool:
        seen = os.fstat(descriptor).st_mtime_ns
        for _ in range(12):
            time.sleep(self._heartbeat / 4)
            if os.stat(self.path).st_mtime_ns != seen:
                return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _read_holder(descriptor: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(holder, dict):
            return holder
    return {}


def _sync_directory(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
