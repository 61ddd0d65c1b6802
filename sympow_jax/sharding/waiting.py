"""Waiting for other processes: in calls of C++, which let no Python handler of a signal run while they block."""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sympow_jax.files import printable

EXIT_AT_ONCE = 137  # see training.signals
_QUIET = 5.0  # seconds without a word about who is waited for
_TICK = 0.2  # seconds until the main thread hears a signal that another thread got


def wait_for(call: Callable[[], Any], whom: Callable[[], str], what: str) -> Any:
    """What `call` returns or raises in a thread of its own, while the main thread hears signals.

    Args:
      call: may block for ever.
      whom: names the processes that are missing, "" for none; said on standard error after some seconds.
      what: is waited for, the end of that line.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    def say() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if (who := whom()) and not answer.done():
                _say(f"waiting for {who} {what}")

    threading.Thread(target=run, name="waiting", daemon=True).start()
    timer = threading.Timer(_QUIET, say)
    timer.daemon = True
    timer.start()
    try:
        while not answer.done():
            concurrent.futures.wait([answer], _TICK)
        return answer.result()
    finally:
        timer.cancel()


@contextlib.contextmanager
def one_signal_waits() -> Iterator[None]:
    """In its block a first SIGINT or SIGTERM is only answered, and a second one ends the process with EXIT_AT_ONCE.

    For a process that has done its work: what it exits with is known.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def handle(number: int, _: Any) -> None:
        if heard:
            os._exit(EXIT_AT_ONCE)
        heard.append(number)
        _say("waiting for the other processes to end; a second signal leaves at once")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
