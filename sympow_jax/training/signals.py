"""Stopping a run on SIGTERM or SIGINT: finish the step, save, exit with a documented code.

The codes of train.py (a sweep stops with that of the first run which does not end with 0):

| exit code | meaning |
|---|---|
| 0 | the run is finished, or was finished already |
| 1 | an error, as when the last checkpoint cannot be saved; its message is the last line |
| 3 | the run is finished and its last checkpoint saved, but one before it was due and could not be; a line says which |
| 130 | stopped by SIGINT (Ctrl-C), checkpoint saved |
| 143 | stopped by SIGTERM (preemption, scheduler), checkpoint saved |
| 137 | a second signal: left at once, as kill -9 would; nothing saved beyond the last checkpoint |

Of several processes a second SIGTERM changes nothing until one has done its work and waits for the others to end.

The other commands end with 0, with 1 after an error or a check that failed (generate --check, verify_resume,
prepare.py verify), with 130 after Ctrl-C, with 143 after SIGTERM and with 141 when the reader of their output has gone;
further, with 2: plan when nothing fits, and prepare.py after an error.
"""

import os
import signal
import socket
import threading

import jax
from jax.experimental import multihost_utils

from sympow_jax.sharding.waiting import EXIT_AT_ONCE

EXIT_UNSAVED = 3
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first SIGTERM or SIGINT; a second one ends the process at once with EXIT_AT_ONCE.

        with StopRequest() as stop:
            for step in ...:
                train_step()
                if stop.poll():
                    save(); raise SystemExit(stop.exit_code)

    `poll` is cheap and belongs after every step, evaluation batch and warm-up step. With several processes it goes
    through JAX's preemption service, so that all processes stop after the same poll: every process must then poll
    equally often, and a second SIGTERM changes nothing, since schedulers send one to each process in their own time.
    Previous handlers come back on exit. Outside the main thread no handler can be installed, and
    only `request` stops the run.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._wakeup: tuple[socket.socket, int] | None = None
        self._polls = 0
        self._stopping = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            reader, writer = socket.socketpair()
            writer.setblocking(False)
            self._wakeup = (writer, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
            threading.Thread(target=self._watch, args=(reader,), name="stop-request", daemon=True).start()
            # With several processes SIGTERM is left to JAX's preemption notifier, which tells the other hosts.
            signals = (signal.SIGINT,) if _multi_process() else _SIGNALS
            self._previous = {number: signal.signal(number, _do_nothing) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}
        if self._wakeup is not None:
            writer, previous = self._wakeup
            signal.set_wakeup_fd(previous)
            writer.close()
            self._wakeup = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Asks for a stop as the signal would."""
        self._signal = self._signal or number

    def poll(self) -> bool:
        """True once the run should save and stop."""
        if _multi_process():
            self._polls += 1
            self._stopping = self._stopping or multihost_utils.reached_preemption_sync_point(self._polls)
            return self._stopping
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """What to exit with after the checkpoint is saved."""
        return EXIT_SIGINT if self._signal == signal.SIGINT else EXIT_SIGTERM

    def _watch(self, reader: socket.socket) -> None:
        """Reads signal numbers as they arrive; unlike a Python handler, also while the main thread is compiling."""
        with reader:
            while numbers := reader.recv(16):
                for number in numbers:
                    if number not in _SIGNALS:
                        continue
                    if self._signal is not None:
                        os._exit(EXIT_AT_ONCE)
                    self._signal = number
                    if _multi_process():
                        os.kill(os.getpid(), signal.SIGTERM)


def _do_nothing(*_: object) -> None:
    """A handler must exist for the signal number to reach the wake-up socket."""


def _multi_process() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1
