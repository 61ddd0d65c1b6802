import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sympow_jax.training.signals import EXIT_AT_ONCE, EXIT_SIGINT, EXIT_SIGTERM, StopRequest

RUN = """
import sys, time
import numpy as np
from sympow_jax.training.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    if sys.argv[1] == "busy":
        x = np.ones((5000, 5000))
        while True:  # the main thread is in compiled code and runs no Python
            x @ x
    while not stop.poll():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(0.2 if sys.argv[1] == "once" else 60)
sys.exit(stop.exit_code)
"""


def run(how: str, *numbers: int) -> tuple[int, str, float]:
    """Sends the signals one after the other; exit code, output, seconds from the last signal to the end."""
    with subprocess.Popen([sys.executable, "-c", RUN, how], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        started = time.monotonic() - 0.3
        output, _ = process.communicate(timeout=30)
        return process.returncode, output, time.monotonic() - started


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_SIGTERM), pytest.param(signal.SIGINT, EXIT_SIGINT, marks=pytest.mark.slow)],
)
def test_the_first_signal_lets_the_run_save(number, code):
    assert run("once", number)[:2] == (code, "saving\n")


def test_a_second_signal_ends_the_process_at_once():
    code, _, seconds = run("slow", signal.SIGINT, signal.SIGTERM)
    assert code == EXIT_AT_ONCE and seconds < 20


@pytest.mark.slow
def test_a_second_signal_ends_the_process_inside_compiled_code():
    code, _, seconds = run("busy", signal.SIGTERM, signal.SIGINT)  # two equal ones might arrive as one
    assert code == EXIT_AT_ONCE and seconds < 20


def test_previous_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.poll() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.poll() and stop.exit_code == EXIT_SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_only_request_stops():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append(stop.poll())
            stop.request(signal.SIGINT)
            seen.extend([stop.poll(), stop.exit_code])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True, EXIT_SIGINT] and signal.getsignal(signal.SIGTERM) == before
