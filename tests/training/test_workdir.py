import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from sympow_jax.training.workdir import LOCK_NAME, WorkdirError, WorkdirLock

HOLD = """
import sys, time
from sympow_jax.training.workdir import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_holder_named(tmp_path, holder):
    with pytest.raises(WorkdirError, match=rf"in use by another run \(host {socket.gethostname()}, pid {holder.pid}"):
        WorkdirLock(tmp_path).acquire()


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == holder.pid
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_one_process_cannot_take_it_twice_but_again_after_release(tmp_path):
    with WorkdirLock(tmp_path):
        with pytest.raises(WorkdirError, match="already in use by this process"):
            WorkdirLock(tmp_path).acquire()
    with WorkdirLock(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).read_bytes() == b""


def test_another_host_is_taken_over_only_without_a_heartbeat(tmp_path):
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "then"}))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    with pytest.raises(WorkdirError, match="host elsewhere, pid 1, since then"):
        WorkdirLock(tmp_path, heartbeat=0.2).acquire()
    stop.set()
    thread.join()
    with WorkdirLock(tmp_path, heartbeat=0.05):
        seen = path.stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while path.stat().st_mtime_ns == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns != seen  # ours beats now


def test_a_garbled_lock_file_does_not_keep_the_folder_locked(tmp_path):
    (tmp_path / LOCK_NAME).write_bytes(b"\x00{")
    with WorkdirLock(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(WorkdirError, match=r"^--workdir=.* cannot be locked \(OSError: .*No locks available\); use a"):
        WorkdirLock(tmp_path).acquire()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"^--workdir=.* cannot be written \(NotADirectoryError") as caught:
        WorkdirLock(pathlib.Path(tmp_path) / "file" / "run").acquire()
    assert "\n" not in str(caught.value)
