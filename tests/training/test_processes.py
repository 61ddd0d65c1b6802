"""Several processes on this machine, joined by jax.distributed: stopping together, and one checkpoint for all."""

import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sympow_jax.training.checkpoint import Checkpointer

pytestmark = pytest.mark.slow

JOIN = """
import os, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
port, count, index, directory = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from sympow_jax.sharding import join_processes, watch
join_processes(f"127.0.0.1:{port}", count, index, heartbeat_seconds=10.0)
from jax.sharding import NamedSharding, PartitionSpec as P
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.signals import StopRequest

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
host = np.arange(64, dtype=np.float32).reshape(8, 8)
make = lambda sharding, x=host: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
"""

STOP = """
step = jax.jit(lambda x: x + x.sum() * 0, out_shardings=rows)
with StopRequest() as stop:
    x, polls = make(rows), 0
    print("ready", flush=True)
    while not stop.poll():
        x, polls = step(x), polls + 1
        x.block_until_ready()
        time.sleep(0.01)
print(polls, flush=True)
sys.exit(stop.exit_code)
"""

SAVE = """
tree = {"sharded": make(rows), "replicated": make(everywhere, host + 1)}
with Checkpointer(directory) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, tree, metadata={"step": step})
print("saved", flush=True)
"""

TRAIN = """
step_fn = jax.jit(lambda x: x + 1 + x.sum() * 0, out_shardings=rows)
with watch(5.0), Checkpointer(directory) as checkpointer:
    x, first = make(rows), 0
    if checkpointer.steps():
        like = {"sharded": x, "replicated": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=everywhere)}
        restored = checkpointer.restore(like=like)
        x, first = restored.tree["sharded"], restored.step
    print("first", first, flush=True)
    for step in range(first + 1, first + int(sys.argv[5]) + 1):
        x = step_fn(x)
        if step % 3 == 0:
            checkpointer.save(step, {"sharded": x, "replicated": make(everywhere, host + 1)}, metadata={"step": step})
            print("step", step, flush=True)
print("done", first, flush=True)
"""

FULL_DISK = """
import resource
from sympow_jax.command_line import run_program

def run(argv):
    big = make(rows, np.random.default_rng(0).standard_normal((1 << 12, 16)).astype(np.float32))
    if index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    with watch(10.0), Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"x": big}, metadata={})
        checkpointer.wait()
        return 0
run_program(run)
"""

LATE = """
with watch(5.0):
    print("ready", flush=True)
    if index == int(sys.argv[5]):
        time.sleep(1000)
"""

PART = """
from sympow_jax.command_line import run_program

def run(argv):
    with watch(60.0):
        print("ready", flush=True)
        while index == 0 and not os.path.exists(os.path.join(directory, "go")):
            time.sleep(0.1)
    return 3
run_program(run)
"""

ALONE = """
import os, signal, sys, time
from sympow_jax.command_line import joined_processes, run_program

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what is in the background without it

def run(argv):
    port, count, index, directory = argv
    place = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": count, "process_id": index}
    with joined_processes(place | {"heartbeat_seconds": "60"}):
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
            if index == "1" and os.path.exists(os.path.join(directory, "print")):
                print("more", flush=True)
run_program(run)
"""

BEFORE = """
import os, sys, time
import jax
from sympow_jax.command_line import joined_processes, run_program

def wait(*args, **kwargs):
    print("ready", flush=True)
    time.sleep(1000)

def run(argv):
    port, count, index, _, victim = argv
    if index == victim:
        jax.distributed.initialize = wait
    place = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": count, "process_id": index}
    with joined_processes(place | {"heartbeat_seconds": "6"}):
        return 0
run_program(run)
"""

RESTORE = """
like = {"sharded": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=everywhere),
        "replicated": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=rows)}
with Checkpointer(directory) as checkpointer:
    restored = checkpointer.restore(like=like)
for name, want in (("sharded", host), ("replicated", host + 1)):
    for shard in restored.tree[name].addressable_shards:
        assert np.array_equal(np.asarray(shard.data), want[shard.index])
print("restored", restored.step, flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    body: str, directory, *more: object, count: int = 2, devices: int = 2, head: str = JOIN
) -> list[subprocess.Popen]:
    port, code = free_port(), head.replace("device_count=2", f"device_count={devices}") + body
    arguments = [[str(port), str(count), str(index), str(directory), *map(str, more)] for index in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, "-c", code, *each], **pipes) for each in arguments]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Last line of each, once all have ended with `code`."""
    outputs = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=180)
            assert process.returncode == code, (process.returncode, output, errors[-3000:])
            outputs.append(output.splitlines()[-1])  # Gloo prints lines of its own before
    finally:
        for process in processes:
            process.kill()
    return outputs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, number, code):
    processes = start(STOP, tmp_path)
    for process in processes:
        assert process.stdout is not None and "ready\n" in iter(process.stdout.readline, "")
    time.sleep(0.5)
    processes[1].send_signal(number)
    polls = [finish([process], expected)[0] for process, expected in zip(processes, (143, code), strict=True)]
    assert polls[0] == polls[1]


def test_two_processes_save_one_reads_and_two_read_again(tmp_path):
    assert finish(start(SAVE, tmp_path)) == ["saved"] * 2
    host = np.arange(64, dtype=np.float32).reshape(8, 8)
    spec = jax.ShapeDtypeStruct((8, 8), np.float32)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        tree = checkpointer.restore(like={"sharded": spec, "replicated": spec}).tree
    assert np.array_equal(np.asarray(tree["sharded"]), host) and np.array_equal(
        np.asarray(tree["replicated"]), host + 1
    )
    assert finish(start(RESTORE, tmp_path)) == ["restored 2"] * 2
    (tmp_path / "2" / "manifest" / "metadata").write_text("{")
    assert finish(start(RESTORE, tmp_path)) == ["restored 1"] * 2
    assert (tmp_path / "2.damaged").is_dir()


def test_one_process_saves_and_two_read(tmp_path):
    host = np.arange(64, dtype=np.float32).reshape(8, 8)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"sharded": host, "replicated": host + 1}, metadata={})
    assert finish(start(RESTORE, tmp_path)) == ["restored 1"] * 2


@pytest.mark.parametrize(
    ("number", "victim", "what"),
    [
        (signal.SIGKILL, 1, "has not been heard of for 5 s"),
        (signal.SIGKILL, 0, "has ended without a word"),
        (signal.SIGSTOP, 0, "has not been heard of for 5 s"),
    ],
)
def test_a_peer_that_dies_or_hangs_ends_the_others_and_leaves_sound_checkpoints(tmp_path, number, victim, what):
    processes = start(TRAIN, tmp_path, 1_000_000)
    try:
        other = processes[1 - victim]
        assert other.stdout is not None
        assert any(line == "step 6\n" for line in iter(other.stdout.readline, ""))
        processes[victim].send_signal(number)
        _, errors = other.communicate(timeout=120)
        assert other.returncode == 1
        assert re.search(rf"^error: process {victim} \(host \S+, pid {processes[victim].pid}\) {what}", errors, re.M)
        assert "stack trace" not in errors and "Traceback" not in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    spec = jax.ShapeDtypeStruct((8, 8), np.float32)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        newest = checkpointer.steps()[-1]
        tree = checkpointer.restore(like={"sharded": spec, "replicated": spec}, strict=True).tree
    assert newest >= 3 and newest % 3 == 0
    assert np.array_equal(np.asarray(tree["sharded"]), np.arange(64, dtype=np.float32).reshape(8, 8) + newest)
    assert finish(start(TRAIN, tmp_path, 4)) == [f"done {newest}"] * 2


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("head", "body", "what"),
    [(JOIN, LATE, "error: process {victim} "), ("", BEFORE, "error: waited 6 s in vain for the other processes")],
)
def test_a_peer_that_dies_as_they_meet_or_part_ends_the_others_in_a_line(tmp_path, head, body, what, victim):
    """Between the roll call and JAX's own meeting, and when the others have done their work."""
    processes = start(body, tmp_path, victim, head=head)
    try:
        stdout = processes[victim].stdout
        assert stdout is not None and "ready\n" in iter(stdout.readline, "")
        time.sleep(1.0)
        processes[victim].kill()
        _, errors = processes[1 - victim].communicate(timeout=30)
        assert processes[1 - victim].returncode == 1
        assert errors.splitlines()[-1].startswith(what.format(victim=victim)), errors
        assert sum(not line.startswith("waiting ") for line in errors.splitlines()) == 1, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_others_work_leaves_the_exit_code_and_a_second_one_leaves_at_once(tmp_path, number):
    for more in (None, number):
        folder = tmp_path / str(more)
        folder.mkdir()
        processes = start(PART, folder)
        waiting = processes[1]
        try:
            assert waiting.stdout is not None and "ready\n" in iter(waiting.stdout.readline, "")
            assert waiting.stderr is not None
            said = iter(waiting.stderr.readline, "")
            assert any(re.match(r"waiting for process 0 \(host \S+, pid \d+\) to do its work$", line) for line in said)
            waiting.send_signal(number)
            assert next(said) == "waiting for the other processes to end; a second signal leaves at once\n"
            if more:
                waiting.send_signal(more)
                assert waiting.wait(20) == 137
            else:
                (folder / "go").touch()
                assert [process.wait(60) for process in processes] == [3, 3]
        finally:
            for process in processes:
                process.kill()
                process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "why"),
    [
        (signal.SIGINT, 130, "KeyboardInterrupt"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (None, 141, "[Errno 32] Broken pipe"),
    ],
)
def test_a_process_that_is_interrupted_ends_with_its_code_and_ends_the_others(tmp_path, number, code, why):
    """Outside training, where the processes would stop together. JAX would wait for the others, and abort."""
    processes = start(ALONE, tmp_path, head="")
    first, second = processes
    try:
        for process in processes:
            assert process.stdout is not None and "ready\n" in iter(process.stdout.readline, "")
        if number:
            second.send_signal(number)
        else:
            assert second.stdout is not None
            second.stdout.close()
            (tmp_path / "print").touch()
        assert (second.wait(30), first.wait(30)) == (code, 1)
        assert first.stderr is not None and second.stderr is not None
        assert re.search(rf"^error: process 1 \(.*\) ended: {re.escape(why)}", first.stderr.read(), re.M)
        assert "stack" not in second.stderr.read()
    finally:
        for process in processes:
            process.kill()
            with process:  # closes the pipes
                pass


def test_a_disk_that_refuses_one_process_ends_all_with_its_reason(tmp_path):
    """The other one waits inside the save, where it would stay."""
    processes = start(FULL_DISK, tmp_path)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert re.search(r"^error: process 1 \(host \S+, pid \d+\) ended: saving step 1 in .*large", errors[0], re.M)
    assert re.search(r"^error: saving step 1 in .* failed \(.*large", errors[1], re.M)
    assert not any("Traceback" in each for each in errors) and not (tmp_path / "1").exists()
