"""Who takes part in a run, asked before JAX joins the processes, at the port where its coordinator will listen.

Process 0 listens, every process says which it is, and all get one answer: a line of JSON each way. JAX itself ends a
process that comes twice, or that nobody meets, with a C++ stack or in silence.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from sympow_jax.files import printable

_QUIET = 5.0  # seconds without a word about who is waited for
_LATE = 5.0  # seconds that an answer stays for those who come late
_PAUSE = 0.5  # seconds between attempts to reach process 0
_SLACK = 10.0  # seconds that the others wait longer than process 0, which can say for whom

Hello = dict[str, Any]


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
    """Returns once processes 0 .. count - 1 have all said that they are there, and are `count`.

    Args:
      address: host:port of process 0, the --coordinator_address.
      count: --num_processes.
      index: --process_id.
      seconds: how long to wait for the others.

    Raises:
      ValueError: in one line, in every process that was met: an id given twice, counts that differ, or who is missing.
    """
    me = {"id": index, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    me["nonce"] = secrets.token_hex(8)  # in containers, hosts and pids repeat
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--coordinator_address = {address!r}: must be HOST:PORT, with a port from 1 to 65535")
    where = (host.strip("[]"), int(port))
    if index == 0:
        _call(where, me, seconds)
    else:
        _answer(where, me, seconds)


def person(hello: Hello) -> str:
    """ "process 1 (host a, pid 7)"."""
    return f"process {hello['id']} (host {hello['host']}, pid {hello['pid']})"


def _call(where: tuple[str, int], me: Hello, seconds: float) -> None:
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", where[1]), family=family, dualstack_ipv6=dual, backlog=max(me["count"], 64))
    except OSError as error:
        raise ValueError(
            f"--coordinator_address: port {where[1]} of this machine cannot be listened at ({error.strerror}); does "
            "another process have --process_id=0, or is an earlier run still there? Stop it or choose another port"
        ) from None
    with server:
        # Another machine's process 0 listens too, but only one is reached at the address.
        threading.Thread(target=_meet_oneself, args=(where, me), name="roll-call", daemon=True).start()
        here, wrong = _listen(server, me, seconds)
        if wrong:
            until = time.monotonic() + _LATE
            while time.monotonic() < until:
                _reply(here, me, wrong)
                here = _hear(server, 0.2)
            raise ValueError(wrong)
        _reply(here, me, "")


def _listen(server: socket.socket, me: Hello, seconds: float) -> tuple[list[tuple[socket.socket, Hello]], str]:
    """Connections and what they said, until all are there or something is wrong; and what is wrong."""
    everyone: list[tuple[socket.socket, Hello]] = []
    present = {0: me}
    start, said = time.monotonic(), False
    while len(present) < me["count"]:
        for peer, hello in _hear(server, 0.2):
            everyone.append((peer, hello))
            if wrong := _wrong(present, hello):
                return everyone, wrong
            present[hello["id"]] = hello
        waited = time.monotonic() - start
        missing = [str(i) for i in range(me["count"]) if i not in present]
        who = f"process{'es' * (len(missing) > 1)} {', '.join(missing[:8])}{' ...' * (len(missing) > 8)}"
        told = f"--num_processes = {me['count']}"
        if missing and waited > seconds:
            return everyone, (
                f"waited {seconds:g} s in vain for {who} of {told}; start what is missing with --coordinator_address "
                "and its --process_id, or correct --num_processes; --heartbeat_seconds waits longer"
            )
        if missing and waited > _QUIET and not said:
            print(f"waiting up to {seconds:g} s for {who} of {told}", file=sys.stderr, flush=True)
            said = True
    return everyone, ""


def _wrong(present: dict[int, Hello], hello: Hello) -> str:
    first = present[0]
    if hello["count"] != first["count"]:
        return (
            f"--num_processes: {first['count']} in {person(first)}, {hello['count']} in {person(hello)}; give every "
            "process the same"
        )
    if not 0 <= hello["id"] < first["count"]:
        return f"--process_id = {hello['id']} of host {hello['host']}: must be from 0 to {first['count'] - 1}"
    other = present.get(hello["id"])
    if other and other["nonce"] != hello["nonce"]:
        return (
            f"--process_id = {hello['id']}: given to two processes, host {other['host']}, pid {other['pid']} and host "
            f"{hello['host']}, pid {hello['pid']}; each needs its own, from 0 to {first['count'] - 1}"
        )
    return ""


def _hear(server: socket.socket, seconds: float) -> list[tuple[socket.socket, Hello]]:
    """The next connection and what it says; nothing where nobody comes, or a stranger."""
    server.settimeout(seconds)
    try:
        peer, _ = server.accept()
    except OSError:
        return []
    hello = _read(peer, 2.0)
    numbers, texts = ("id", "count", "pid"), ("host", "nonce")
    if all(type(hello.get(n)) is int for n in numbers) and all(isinstance(hello.get(n), str) for n in texts):
        return [(peer, hello)]
    peer.close()
    return []


def _reply(everyone: list[tuple[socket.socket, Hello]], me: Hello, wrong: str) -> None:
    answer = json.dumps({"wrong": wrong, "from": me["nonce"]}) + "\n"
    for peer, _ in everyone:
        try:
            peer.sendall(answer.encode())
            peer.close()
        except OSError:
            continue  # it has gone, which JAX or the watch will notice


def _answer(where: tuple[str, int], me: Hello, seconds: float) -> None:
    until = time.monotonic() + seconds + _SLACK
    strangers, reason = 0, "nobody answers"
    while (left := until - time.monotonic()) > 0 and strangers < 10:
        try:
            reply = _ask(where, me, left)
        except OSError as error:
            reason = error.strerror or str(error) or reason
            reply = None
        if reply and "wrong" in reply:
            if reply["wrong"]:
                raise ValueError(str(reply["wrong"]))
            return
        strangers += reply is not None
        time.sleep(_PAUSE)
    why = "something else listens there, or that run has all its processes already" if strangers else reason
    raise ValueError(
        f"--coordinator_address = '{where[0]}:{where[1]}': process {me['id']} found no process 0 waiting ({why}); "
        "check that process 0 runs there, that the port is open, and that each --process_id is given once"
    )


def _ask(where: tuple[str, int], me: Hello, seconds: float) -> dict[str, Any]:
    with socket.create_connection(where, timeout=min(seconds, 10.0)) as peer:
        peer.sendall((json.dumps(me) + "\n").encode())
        return _read(peer, seconds)


def _read(peer: socket.socket, seconds: float) -> dict[str, Any]:
    """One line of JSON; empty where something else, or nothing, was said."""
    peer.settimeout(seconds)
    try:
        line = peer.makefile("rb").readline(1 << 16)
        value = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _meet_oneself(where: tuple[str, int], me: Hello) -> None:
    try:
        reply = _ask(where, me, 3600.0)
    except OSError:
        return  # not every network leads back; the others say what they cannot reach
    if reply.get("wrong") and reply.get("from") != me["nonce"]:
        print(f"error: {printable(str(reply['wrong']))}", file=sys.stderr, flush=True)
        os._exit(1)
