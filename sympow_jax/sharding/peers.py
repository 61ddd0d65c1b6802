"""Processes that watch each other: when one ends or falls silent, the others end too, each with the same line.

JAX notices as well, later, by aborting with a C++ stack. Every process writes a beat into the key-value store of JAX's
coordinator, which lives in process 0, and its last words when it fails. Process 0 looks at all beats, the others at
process 0 and at the last words. A collective that waits for a process that has gone is left by `os._exit`.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

from sympow_jax.files import printable
from sympow_jax.sharding.last_words import LastWords
from sympow_jax.sharding.waiting import one_signal_waits, wait_for

HEARTBEAT_SECONDS = 40.0
_INTERVAL = 1.0  # seconds between beats
_OWN_WORDS = 2.0  # seconds for a process that is told of another's end, to say its own
_PUBLISHED_WITHIN = 4.0  # seconds
_LINGER = 6.0  # seconds that process 0 stays, so that the others can read why it ends, and say what they have to
_NETWORK = re.compile(r"(?i:\b(gloo|nccl)\b|connection (reset|closed))|\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b")
PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds: one may prepare data for hours; the watch ends the wait for the dead
_watches = itertools.count()
_WHO, _BEAT, _FAILED = "sympow_jax/who/", "sympow_jax/beat/", "sympow_jax/failed/"


def coordination() -> tuple[Any, int, int]:
    """The client of the coordinator's key-value store, which process this is, and of how many: (None, 0, 1) alone.

    JAX has no public name for the client, and `jax.process_index` waits for the devices of all processes.
    """
    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return None, 0, 1
    return state.client, state.process_id, state.num_processes


def absent(client: Any, folder: str, count: int) -> str:
    """ "process 1 (host b, pid 2)": which of `count` processes have no key in a folder of the store; "" for none."""
    there = {key.rpartition("/")[2] for key, _ in client.key_value_dir_get(f"{folder}/")}
    names = {key.rpartition("/")[2]: name for key, name in client.key_value_dir_get(_WHO)}
    missing = [names.get(index, f"process {index}") for index in map(str, range(count)) if index not in there]
    return ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")


@contextlib.contextmanager
def watch(seconds: float = HEARTBEAT_SECONDS) -> Iterator[None]:
    """Runs its block while this process and the others watch each other; does nothing in a run of one process.

    It ends once all have run their blocks. An error of the block reaches the other processes as their last line. Where
    the error is that of a collective, the one to blame is somebody else: it is waited for until the watch knows whom.

    Args:
      seconds: how long a process may be silent, stopped or cut off, before the others end with exit code 1.
    """
    client, index, count = coordination()
    if client is None:
        yield
        return
    watcher = Watcher(client, index, count, seconds)
    watcher.start()
    try:
        yield
        _part(client, index, count)
    except BaseException as error:
        if _is_collective(error):
            time.sleep(seconds + 2 * _INTERVAL)  # the watch ends the process when it knows who has gone
        watcher.fail(error)
        raise
    watcher.stop()


def _part(client: Any, index: int, count: int) -> None:
    """Returns once all processes are here: JAX's own end aborts where one has gone."""
    folder = f"sympow_jax/done/{next(_watches)}"
    with one_signal_waits():
        client.key_value_set(f"{folder}/{index}", "")
        wait_for(
            lambda: client.wait_at_barrier(folder, PATIENCE), lambda: absent(client, folder, count), "to do its work"
        )


def _is_collective(error: BaseException | None) -> bool:
    """Whether a collective or the coordinator failed, as when another process has gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            return True
        if not _is_plain(error) and _NETWORK.search(str(error)):  # some reach Python as a ValueError
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_plain(error: BaseException) -> bool:
    """Whether an error is of this package or of the system: names of files and words of users are in its text."""
    of_package = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return of_package or (isinstance(error, OSError) and error.errno is not None)


class Watcher:
    """The threads behind `watch`: one talks to the coordinator, which may take for ever, and one looks at the time."""

    def __init__(self, client: Any, index: int, count: int, seconds: float):
        self._client, self._index, self._count, self._seconds = client, index, count, seconds
        self._me = f"process {index} (host {socket.gethostname()}, pid {os.getpid()})"
        self._names: dict[int, str] = {}
        self._silent = dict.fromkeys(range(1, count) if index == 0 else [0], 0.0)
        self._beats: dict[int, str] = {}
        self._told = ""  # the last words of another process
        self._words = LastWords()
        self._ended = threading.Event()
        self._speaking = threading.Lock()

    def start(self) -> None:
        """Begins to beat and to look."""
        self._client.key_value_set(f"{_WHO}{self._index}", self._me, allow_overwrite=True)
        for run in (self._talk, self._look):
            threading.Thread(target=run, name=f"watch{run.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Ends without a word."""
        self._ended.set()
        self._words.close()

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends; returns when they have had the time to read it."""
        with self._speaking:
            self._ended.set()
        plain = str(error) and (
            isinstance(error, (ValueError, RuntimeError, OSError)) or not isinstance(error, Exception)
        )
        self._publish(f"{self._me} ended: {error if plain else repr(error)}")
        self._words.close()

    def _publish(self, text: str) -> None:
        def write() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{_FAILED}{self._index}", text, allow_overwrite=True)

        writer = threading.Thread(target=write, name="watch-publish", daemon=True)
        writer.start()
        writer.join(_PUBLISHED_WITHIN)
        if self._index == 0:
            time.sleep(_LINGER)

    def _end(self, text: str) -> None:
        """Says it, here and in the other processes, and leaves."""
        with self._speaking:
            if self._ended.is_set():
                return
            self._ended.set()
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
                sys.stdout.flush()
            self._words.say(f"error: {printable(' '.join(text.split()))}")
            if self._index == 0:
                self._publish(text)
            os._exit(1)

    def _talk(self) -> None:
        for index in self._silent:  # whom this process may have to name, from the first step on
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                name = self._client.blocking_key_value_get(f"{_WHO}{index}", int(1000 * _INTERVAL))
                self._names[index] = name
        beat = 0
        while not self._ended.wait(_INTERVAL):
            beat += 1
            try:
                self._client.key_value_set(f"{_BEAT}{self._index}", str(beat), allow_overwrite=True)
                failed = sorted(self._client.key_value_dir_get(_FAILED))
                beats = dict(self._client.key_value_dir_get(_BEAT)) if self._index == 0 else {}
                if len(self._names) < self._count:
                    names = dict(self._client.key_value_dir_get(_WHO))
                    self._names |= {int(key.rpartition("/")[2]): name for key, name in names.items()}
            except jax.errors.JaxRuntimeError:
                self._gone()
                continue
            if failed:
                self._told = failed[0][1]
                self._ended.wait(_OWN_WORDS)  # this one may be about to say the same of its own
                self._end(self._told)
            self._heard(beats)

    def _heard(self, beats: dict[str, str]) -> None:
        if self._index:
            self._silent[0] = 0.0  # it answered
        for key, value in beats.items():
            index = int(key.rpartition("/")[2])
            if index in self._silent and self._beats.get(index) != value:
                self._silent[index] = 0.0
            self._beats[index] = value

    def _name(self, index: int) -> str:
        return self._names.get(index, f"process {index}")

    def _gone(self) -> None:
        """The connection to the coordinator broke."""
        if self._index:
            self._end(self._told or f"{self._name(0)} has ended without a word; {_ADVICE}")

    def _look(self) -> None:
        while not self._ended.wait(_INTERVAL / 2):
            if self._words.aborting.is_set():
                self._gone()
            for index in self._silent:
                self._silent[index] += _INTERVAL / 2  # ticks, not the clock: this one may have been stopped
            worst = max(self._silent, key=self._silent.__getitem__)
            if self._silent[worst] > self._seconds:
                silence = f"has not been heard of for {self._seconds:g} s (--heartbeat_seconds)"
                self._end(self._told or f"{self._name(worst)} {silence}; {_ADVICE}")


_ADVICE = (
    "was it killed, stopped or out of memory, or is its host cut off? Look at its log, end what is left of it, and run "
    "the same command again: it continues from the newest checkpoint"
)
