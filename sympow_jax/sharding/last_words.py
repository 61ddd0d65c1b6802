"""Standard error while JAX's coordination may abort this process: its page of C++ frames is held back.

JAX aborts from a C++ thread as soon as the coordinator's connection breaks, which no Python handler sees. What C++
writes passes through a pipe, and the abort sleeps for some seconds: time to say in one line what happened.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

_FATAL = re.compile(
    rb"(?m)^[EF]\d{4} .*(coordination_service_agent\.cc|JAX distributed service detected)"
    rb"|^W\d{4} .*preemption_sync_manager\.cc:\d+\] Failed"
)
_SECONDS = 5.0  # that text is held back, less than the abort sleeps


class LastWords:
    """`aborting` is set when JAX says that it will end this process; what it says is held back for a while."""

    def __init__(self) -> None:
        self.aborting = threading.Event()
        self._released = threading.Event()
        libc = ctypes.CDLL(None)
        # The handler is sleep(3), safe in a handler; its argument is the number of the signal, 6 seconds.
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        sys.stderr.flush()
        self._real = os.dup(2)
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        self._thread = threading.Thread(target=self._pass_on, args=(reader,), name="last-words", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """Writes past the pipe."""
        with contextlib.suppress(OSError):
            os.write(self._real, f"{line}\n".encode(errors="replace"))

    def close(self) -> None:
        """Standard error is as it was, and all that was written has arrived."""
        self._released.set()
        with contextlib.suppress(ValueError, OSError):
            sys.stderr.flush()
        os.dup2(self._real, 2)
        self._thread.join(1.0)  # a child process may still hold the pipe

    def _pass_on(self, reader: int) -> None:
        while chunk := os.read(reader, 1 << 16):
            if not self.aborting.is_set() and _FATAL.search(chunk):
                self.aborting.set()
                self._released.wait(_SECONDS)
            with contextlib.suppress(OSError):
                os.write(self._real, chunk)
