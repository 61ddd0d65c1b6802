"""Processes that disagree, come twice or not at all: one line, from small pieces in threads."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.files import FileError
from sympow_jax.sharding import agreement, last_words, peers, roll_call, waiting
from sympow_jax.sharding.agreement import agree, differences, gather
from sympow_jax.training.manifest import CheckpointError
from tests.training.test_processes import free_port


class Store:
    """The key-value store of the coordinator, in one process."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 10)
            return self.values[key]

    def key_value_delete(self, key):
        del self.values[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


def in_processes(count, monkeypatch, body):
    """What `body(index)` returned or raised in each of `count` threads that take themselves for processes."""
    store, here = Store(), threading.local()
    monkeypatch.setattr(agreement, "coordination", lambda: (store, here.index, count))
    monkeypatch.setattr(agreement, "_calls", iter(lambda: 0, 1))

    def run(index):
        here.index = index
        try:
            return body(index)
        except (ValueError, RuntimeError) as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count))), store


def test_a_difference_names_field_values_and_processes():
    assert differences([{"a": "1", "b": "2"}] * 3) == ""
    assert differences([{"a": "1"}, {"a": "2"}, {"a": "1"}, {}]) == (
        "a: 1 in processes 0, 2, 2 in process 1, absent in process 3"
    )
    many = differences([{str(i): "x" for i in range(9)}, {}], most=2)
    assert many == "0: x in process 0, absent in process 1; 1: x in process 0, absent in process 1; and 7 more"


def test_all_processes_raise_the_same_line_and_agreement_is_silent(monkeypatch):
    rates = [0.003, 0.003, 0.001]
    got, _ = in_processes(3, monkeypatch, lambda i: agree("settings", {"rate": rates[i], "seed": 0}, advice="mend it"))
    assert got == ["rate: 0.003 in processes 0, 1, 0.001 in process 2; mend it"] * 3
    got, store = in_processes(3, monkeypatch, lambda _: agree("settings", {"rate": 1.0}, advice="mend it"))
    assert got == [None] * 3 and all(key.endswith("/all") for key in store.values)


def test_gather_is_in_the_order_of_the_processes(monkeypatch):
    assert in_processes(3, monkeypatch, lambda i: gather("names", [i, "x"]))[0] == [[[0, "x"], [1, "x"], [2, "x"]]] * 3
    monkeypatch.undo()
    assert gather("alone", 7) == [7]


def test_the_main_thread_is_free_for_signals_while_it_waits_and_says_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "_QUIET", 0.1)
    store = Store()
    store.values = {"sympow_jax/who/1": "process 1 (host b, pid 2)", "here/0": ""}

    def call():
        time.sleep(0.5)
        return threading.current_thread()

    assert waiting.wait_for(call, lambda: peers.absent(store, "here", 3), "to come") is not threading.main_thread()
    assert capsys.readouterr().err == "waiting for process 1 (host b, pid 2), process 2 to come\n"
    with pytest.raises(ValueError, match="as it was"):
        waiting.wait_for(lambda: agree_not("as it was"), lambda: "", "")


def agree_not(text):
    raise ValueError(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_parts_answers_one_signal_and_leaves_at_the_second(number, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(waiting.os, "_exit", left.append)
    before = signal.getsignal(number)
    with waiting.one_signal_waits():
        os.kill(os.getpid(), number)
        assert left == []
        assert capsys.readouterr().err == "waiting for the other processes to end; a second signal leaves at once\n"
        os.kill(os.getpid(), number)
    assert left == [137] and signal.getsignal(number) == before


def call(monkeypatch, *hellos, seconds=5.0):
    """What roll calls with these (count, index) raised, "" for nothing."""
    monkeypatch.setattr(roll_call, "_LATE", 0.3)
    monkeypatch.setattr(roll_call, "_PAUSE", 0.05)
    address = f"127.0.0.1:{free_port()}"

    def run(hello):
        try:
            roll_call.roll_call(address, *hello, seconds)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(hellos)) as pool:
        return list(pool.map(run, hellos))


def test_the_roll_is_complete(monkeypatch):
    assert call(monkeypatch, (3, 2), (3, 0), (3, 1)) == [""] * 3


def test_an_id_given_twice_is_named_in_all(monkeypatch):
    said = call(monkeypatch, (3, 0), (3, 1), (3, 1))
    assert len({*said}) == 1 and said[0].startswith("--process_id = 1: given to two processes, host ")


def test_counts_that_differ_are_named_in_all(monkeypatch):
    said = call(monkeypatch, (2, 0), (3, 1))
    assert said[0] == said[1] and "--num_processes: 2 in process 0 (host " in said[0] and ", 3 in process 1" in said[0]


def test_who_does_not_come_is_named_in_all(monkeypatch, capsys):
    monkeypatch.setattr(roll_call, "_QUIET", 0.1)
    said = call(monkeypatch, (4, 0), (4, 2), seconds=0.5)
    assert said[0] == said[1] and said[0].startswith("waited 0.5 s in vain for processes 1, 3 of --num_processes = 4")
    assert capsys.readouterr().err.startswith("waiting up to 0.5 s for processes 1, 3 of --num_processes = 4\n")


@pytest.mark.slow
def test_two_processes_0_and_a_stranger_at_the_port(monkeypatch):
    said = sorted(call(monkeypatch, (2, 0), (2, 0), seconds=0.5))
    assert said[0].startswith("--coordinator_address: port ") and "--process_id=0" in said[0]
    assert said[1].startswith("waited 0.5 s in vain for process 1")
    monkeypatch.setattr(roll_call, "_ask", lambda *_: {})  # what anything else that listens amounts to
    said = call(monkeypatch, (2, 1))[0]
    assert "found no process 0 waiting (something else listens there, or that run has all its processes" in said
    assert call(monkeypatch, (2, 1), seconds=-9.9)[0].endswith("that each --process_id is given once")
    with pytest.raises(ValueError, match=r"--coordinator_address = 'host': must be HOST:PORT"):
        roll_call.roll_call("host", 2, 1, 1.0)


class Words:
    """Standard error that is not touched."""

    def __init__(self):
        self.aborting, self.said = threading.Event(), []
        self.say, self.close = self.said.append, lambda: None


class Left(BaseException):
    pass


@pytest.fixture
def watchers(monkeypatch):
    """Two watchers on one store, whose threads do not run; `os._exit` raises Left."""

    def leave(code):
        raise Left(code)

    def start(thread):
        if thread.name in ("watch-publish", "waiting"):
            thread.run()

    monkeypatch.setattr(peers, "LastWords", Words)
    monkeypatch.setattr(peers, "_INTERVAL", 0.02)
    for seconds in ("_LINGER", "_OWN_WORDS", "_PUBLISHED_WITHIN"):
        monkeypatch.setattr(peers, seconds, 0.01)
    monkeypatch.setattr(peers.os, "_exit", leave)
    monkeypatch.setattr(peers.threading.Thread, "start", start)
    monkeypatch.setattr(peers.threading.Thread, "join", lambda self, timeout=None: None)
    store = Store()
    pair = [peers.Watcher(store, index, 2, 0.1) for index in range(2)]
    for each in pair:
        each.start()
    return store, pair


def test_the_last_words_of_a_process_end_the_other_with_them(watchers):
    _, (first, second) = watchers
    first.fail(OSError("no space\nleft"))
    with pytest.raises(Left):
        second._talk()
    assert len(second._words.said) == 1
    assert second._words.said[0].startswith("error: process 0 (host ")
    assert second._words.said[0].endswith(") ended: no space left")


def test_who_fails_as_well_says_so_in_its_own_words(watchers):
    """Where all find the same fault, as when they do not agree: the first to end does not speak for the others."""
    _, (first, second) = watchers
    first.fail(ValueError("the same"))
    wait = second._ended.wait

    def fails_meanwhile(seconds):
        if "sympow_jax/beat/1" in second._client.values:  # it has looked
            second._ended.set()
        return wait(seconds)

    second._ended.wait = fails_meanwhile
    second._talk()
    assert second._words.said == []


@pytest.mark.parametrize("meanwhile", ["process 0 leaves", "no beat is read"])
def test_what_a_process_was_told_is_its_line_whatever_happens_while_it_waits(watchers, meanwhile):
    _, (first, second) = watchers
    first.fail(ValueError("the reason"))
    wait, waited = second._ended.wait, []

    def look_meanwhile(seconds):
        waited.append(seconds)
        if len(waited) == 2:  # once it has looked
            second._words.aborting.set() if meanwhile == "process 0 leaves" else second._silent.update({0: 9.0})
            second._look()
        return wait(seconds)

    second._ended.wait = look_meanwhile
    with pytest.raises(Left):
        second._talk()
    assert second._words.said[0].endswith(" ended: the reason") and len(second._words.said) == 1


def test_a_process_without_a_beat_is_named_to_all(watchers):
    _, (first, second) = watchers
    first._names[1] = "process 1 (host b, pid 2)"
    with pytest.raises(Left):
        first._look()
    line = "error: process 1 (host b, pid 2) has not been heard of for 0.1 s (--heartbeat_seconds); "
    assert first._words.said[0].startswith(line)
    with pytest.raises(Left):
        second._talk()
    assert second._words.said == first._words.said
    beats = {"sympow_jax/beat/0": "1", "sympow_jax/beat/1": "7"}
    first._heard(beats)
    first._silent[1] = 9.0
    first._heard(beats)
    assert first._silent == {1: 9.0}  # an old beat is none


def test_processes_that_are_done_wait_for_the_others_under_the_watch(watchers, monkeypatch):
    """JAX would wait for one that has gone for minutes, and then abort."""
    store, _ = watchers
    monkeypatch.setattr(peers, "coordination", lambda: (store, 1, 2))
    met: list[str] = []
    store.wait_at_barrier = lambda name, milliseconds: met.append(name)
    for number in range(2):
        with peers.watch(0.1):
            assert len(met) == number
    assert len({*met}) == 2

    def broken(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    store.wait_at_barrier = broken
    begun = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError), peers.watch(0.1):
        pass
    assert time.monotonic() - begun > 0.1  # the watch had the time to end this process


def test_a_coordinator_that_aborts_or_cannot_be_reached_is_process_0(watchers):
    store, (_, second) = watchers

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    second._words.aborting.set()
    with pytest.raises(Left):
        second._look()
    assert second._words.said[0].startswith("error: process 0 has ended without a word; was it killed")
    third = peers.Watcher(store, 1, 2, 0.1)
    store.key_value_set = broken
    with pytest.raises(Left):
        third._talk()
    assert re.match(r"error: process 0 \(host \S+, pid \d+\) has ended without a word; was it", third._words.said[0])


def test_an_error_of_a_collective_is_another_process_s():
    def checkpoint_error(cause):
        error = CheckpointError("saving step 1 failed")
        error.__cause__ = cause
        return error

    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer")
    nccl, late = RuntimeError("NCCL operation failed"), ValueError("DEADLINE_EXCEEDED: Barrier timed out")
    for cause in (gloo, nccl, late, jax.errors.JaxRuntimeError("INTERNAL: x")):
        assert peers._is_collective(cause) and peers._is_collective(checkpoint_error(cause))
    ours = (
        CheckpointError("step 1 in runs/nccl: UNAVAILABLE"),
        ConfigError("--workdir = 'gloo': no such folder"),
        FileError("runs/NCCL cannot be read"),
    )
    for cause in (
        OSError(28, "No space left on device"),
        OSError(11, "Resource temporarily unavailable"),
        PermissionError(13, "Permission denied", "runs/gloo/config.json"),
        ValueError("runs/nccl_test is unavailable"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"),
        *ours,
    ):
        assert not peers._is_collective(cause) and not peers._is_collective(checkpoint_error(cause))


@pytest.mark.parametrize(
    ("written", "held", "want"),
    [
        (b"E1125 1 coordination_service_agent.cc:289] Polled an error\n", True, b"error: one\n"),
        (b"W1127 1 preemption_sync_manager.cc:147] Failed to retrieve preemption notice\n", True, b"error: one\n"),
        (
            b"E1125 1 gpu.cc:1] of another part\nno end of line",
            False,
            b"E1125 1 gpu.cc:1] of another part\nno end of line",
        ),
    ],
)
def test_what_jax_says_before_it_aborts_is_held_back_and_nothing_else(written, held, want):
    code = f"""
import importlib.util, os, time
spec = importlib.util.spec_from_file_location("last_words", {str(pathlib.Path(last_words.__file__))!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
words = module.LastWords()
os.write(2, {written!r})
if {held}:
    assert words.aborting.wait(10)
    time.sleep(0.2)
    words.say("error: one")
    os._exit(1)
words.close()
assert not words.aborting.is_set()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).stderr == want
