"""The folder of a run: no links in it, and a lock so that two runs never write the same one."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from sympow_jax.config import RunError
from sympow_jax.files import FileError, inside, one_line, open_regular, refuse_link

LOCK_NAME = ".lock"
_FILES = (LOCK_NAME, "config.json", "data.json", "init_from.json", "metrics.jsonl", "wandb.json")
_FOLDERS = ("checkpoints", "eval", "profile", "tensorboard", "tokenizer", "wandb")


class WorkdirError(RunError):
    """A workdir that cannot be written or is held by another run; the message is one line."""


def refuse_links(workdir: str | os.PathLike) -> None:
    """Raises FileError where one of the files and folders of a run, or an entry of such a folder, is a link.

    A workdir may come from anyone: what is written to it, or shown of it, must not go through a link to elsewhere. The
    workdir itself may be a link.
    """
    for name in _FILES:
        inside(workdir, name)
    for name in _FOLDERS:
        folder = inside(workdir, name)
        for name_inside in os.listdir(folder) if folder.is_dir() else ():
            refuse_link(folder / name_inside)


class WorkdirLock:
    """Holds a workdir for one run: `with WorkdirLock(workdir): ...`; raises WorkdirError when another run has it.

    The holder keeps a POSIX record lock on `<workdir>/.lock`, which the kernel drops when the process ends, however it
    ends, so a killed run leaves nothing to clean. The file says who holds it (host, pid, start time). Where a
    network file system does not carry record locks between hosts, a heartbeat decides: the holder touches the
    file every `heartbeat` seconds, and a run on another host takes over once three of them have been missed.
    Only process 0 of a multi-process run takes the lock. `name` and `what` are for a part of the folder: the file that
    is locked, and what messages call it.
    """

    def __init__(self, workdir: str | os.PathLike, *, name: str = LOCK_NAME, what: str = "", heartbeat: float = 10.0):
        self.path = pathlib.Path(workdir).resolve() / name
        self._what = what or f"--workdir={self.path.parent}"
        self._heartbeat = heartbeat
        self._file: int | None = None
        self._released = threading.Event()

    _held_here: set[pathlib.Path] = set()  # record locks do not exclude a second holder in the same process

    def acquire(self) -> "WorkdirLock":
        """Takes the lock or raises WorkdirError."""
        if self.path in self._held_here:
            raise WorkdirError(f"{self._what} is already in use by this process")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except (OSError, FileError) as error:
            raise WorkdirError(f"{self._what} cannot be written ({one_line(error)})") from None
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    hint = "use a file system that has record locks"
                    raise WorkdirError(f"{self._what} cannot be locked ({one_line(error)}); {hint}") from None
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
            f"{self._what} is in use by another run (host {known['host']}, pid {known['pid']},"
            f" since {known['started']}); wait for it, stop it, or choose another"
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
