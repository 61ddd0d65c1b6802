"""What every command shares: flags, errors as one line, the compilation cache, and the process around `main`."""

import contextlib
import ctypes
import dataclasses
import gc
import glob
import logging
import math
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from sympow_jax.config import ConfigError, MeshConfig, RunError, check_numbers, nearest, parse_value
from sympow_jax.files import printable

USER_ERRORS = (RunError, ValueError, OSError)  # a ConfigError is a ValueError
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # mallopt(3)

_MAX_MESSAGE = 2000
HEARTBEAT_BOUNDS = {"least": 5, "most": 7 * 86400}
_PLACE = {"coordinator_address": "", "num_processes": 0, "process_id": -1}
PROCESS_FLAGS = (*_PLACE, "heartbeat_seconds")
MESH_FLAGS = tuple(f"mesh.{axis.name}" for axis in dataclasses.fields(MeshConfig) if axis.name != "cpu_devices")

log = logging.getLogger(__name__)


class Terminated(BaseException):
    """SIGTERM came to one of several processes; `run_program` exits with 143."""


_INTERRUPTED = {KeyboardInterrupt: 130, BrokenPipeError: 141, Terminated: 143}


class _Printable(logging.Formatter):
    """Log lines that a terminal only shows: names of files and arrays are in them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def one_line_errors(run: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; an error that the user can mend becomes one line on standard error and exit code 1.

    BrokenPipeError is left to `run_program`: who reads the output has gone.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        code = run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is known here
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        message = (str(error) or type(error).__name__) if isinstance(error, USER_ERRORS) else _of_machine(error)
        if os.environ.get("SYMPOW_JAX_TRACEBACK") or not message:
            raise
        message = printable(" ".join(message.split()))
        if len(message) > _MAX_MESSAGE:  # with a value of a file that anyone may have written
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
    gc.collect()  # what the failed parts have still to say comes before the line that counts
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def _of_machine(error: Exception) -> str:
    """What this machine lacks for what was asked, memory or a platform; "" for an error of any other kind."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory ({str(error) or type(error).__name__}): lower data.batch_size, data.seq_len or the sizes "
            "under model.* in training, or raise optimizer.accumulation_steps; --lengths, --num_documents, "
            "--num_examples or evaluation.chunk_size in an evaluation; --batch or --max_new_tokens in generation"
        )
    return _missing_platform()


def _missing_platform() -> str:
    """What is wrong with JAX_PLATFORMS, which JAX reports in many ways; "" when it names something that is there."""
    import jax

    if _is_joined():  # there it waits for the devices of the other processes
        return ""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        said = f" ({error})" if str(error) else ""
        wanted = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX_PLATFORMS = {wanted!r}: is not there{said}; install its plugin, or unset the variable"
    return ""


def _is_joined() -> bool:
    """Whether JAX has joined this process to others; imports nothing."""
    distributed = getattr(sys.modules.get("jax"), "distributed", None)
    return distributed is not None and distributed.is_initialized()


def run_program(run: Callable[[Sequence[str]], int], *, keep_memory: bool = True) -> NoReturn:
    """Exits with the code of `run` on this process's flags, 130 after Ctrl-C, 141 when the reader of a pipe has gone.

    After an error nothing prints past its one line, and nothing holds up the end, as the threads of a failed save
    would, or JAX, which waits minutes for the other processes and then aborts. What the terminal's encoding lacks is
    printed as a question mark. `keep_memory` is for commands that run programs (see keep_freed_memory).
    """
    from rich.console import Console

    Console.on_broken_pipe = _reader_has_gone  # pyright: ignore[reportAttributeAccessIssue]  (it would exit with 1)
    gc.set_threshold(100_000)  # imports and tracing make objects by the million, nearly all of which stay
    if keep_memory:
        keep_freed_memory()
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed by the caller
    for stream in streams:
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    silent: list[Any] = []
    at_once = False
    try:
        code = one_line_errors(run, sys.argv[1:])
    except tuple(_INTERRUPTED) as error:
        code, at_once = _INTERRUPTED[type(error)], _is_joined()
        silent = streams if code == 141 else []
    except Exception:
        if not _is_joined():
            raise
        traceback.print_exc()
        code = 1
    if at_once or (code == 1 and not os.environ.get("SYMPOW_JAX_TRACEBACK")):
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    for stream in silent:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _reader_has_gone(console: object) -> NoReturn:
    raise BrokenPipeError


def keep_freed_memory() -> bool:
    """Keeps what a program frees for the next one, where programs run on the CPU; returns whether it does.

    XLA allocates the temporaries of a program when it starts and frees them when it ends. glibc gives blocks of that
    size back to the system at once, so that every step faults in, and the system clears, each page again
    (RESULTS.md, training step). The price is memory: the process keeps the most that it ever used, compilation and
    checkpoints included, and a block that finds no hole of its size grows the heap. Call it before JAX starts its
    threads, which would take heaps of their own.

    Nothing changes beside an accelerator, with another C library, or where the environment already sets glibc's malloc
    (MALLOC_* or GLIBC_TUNABLES; MALLOC_ARENA_MAX=8 is enough to turn this off).
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    accelerated = any(glob.glob(pattern) for pattern in _ACCELERATORS)
    if platform.libc_ver()[0] != "glibc" or accelerated or theirs:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])


def split_flags(
    argv: Sequence[str],
    known: Sequence[str],
    *,
    switches: Sequence[str] = (),
    prefix: str = "",
    may_be_empty: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """--name=value flags of `known` and bare --switches as a dict; the rest must start with --`prefix`."""
    values, rest = {}, []
    for flag in argv:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r}: expected --name=value{nearest(flag, known)}")
        if name in switches and not equals:
            values[name] = "true"
        elif name in known and (value or (equals and name in may_be_empty)):
            values[name] = value
        elif prefix and name.startswith(prefix):
            rest.append(flag)
        else:
            if name in known:
                raise ConfigError(f"--{name} needs a value: --{name}=VALUE")
            if name in switches:
                raise ConfigError(f"--{name} takes no value: write --{name}, or leave it out")
            raise ConfigError(f"--{name}: no such flag{nearest(name, [*known, *switches, prefix])}")
    return values, rest


def flag_value(
    flags: Mapping[str, str], name: str, default: Any, *, least: float = -math.inf, most: float = math.inf
) -> Any:
    """The value of --name as the type of `default`, which it has where the flag is absent.

    Numbers, one or a tuple of them, are from `least` to `most`, and those of a tuple differ.
    """
    if name not in flags:
        return default
    value = parse_value(flags[name], default, f"--{name}")
    if not isinstance(value, str):
        check_numbers(f"--{name}", value if isinstance(value, tuple) else (value,), least=least, most=most)
    return value


def step_flag(flags: Mapping[str, str]) -> str | int:
    """--step=latest|best|N; the latest step where the flag is absent."""
    step = flags.get("step", "latest")
    if step not in ("latest", "best") and not (step.isascii() and step.isdigit()):
        raise ConfigError(f"--step = {step!r}: choose latest, best or a step number{nearest(step, ('latest', 'best'))}")
    return int(step) if step.isdigit() else step


@contextlib.contextmanager
def joined_processes(flags: Mapping[str, str], *, polls: bool = False) -> Iterator[None]:
    """Runs its block as one of the processes that PROCESS_FLAGS or a launcher name; they watch each other.

    SIGTERM, which JAX only notes there, raises Terminated, unless the block `polls` a StopRequest.
    """
    from sympow_jax import sharding

    heartbeat = flag_value(flags, "heartbeat_seconds", sharding.HEARTBEAT_SECONDS, **HEARTBEAT_BOUNDS)
    places = {name: flag_value(flags, name, default) for name, default in _PLACE.items()}
    sharding.join_processes(**places, heartbeat_seconds=heartbeat)
    if _is_joined() and not polls:
        signal.signal(signal.SIGTERM, _terminate)
    with sharding.watch(heartbeat):
        yield


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait
    raise Terminated("stopped by SIGTERM")


def mesh_flags(flags: Mapping[str, str]) -> dict[str, int]:
    """The sizes of MESH_FLAGS by axis, of those that are given."""
    sizes = {name.partition(".")[2]: flag_value(flags, name, 1, least=-1) for name in MESH_FLAGS if name in flags}
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(f"--mesh.{axis} = 0: a number of devices, or -1 for what the other axes leave")
    return sizes


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the user's cache folder (mode 0700: it holds executable content).

    Where that folder cannot be made or written, or is another user's, a warning says so and nothing is kept.
    """
    import jax

    from sympow_jax.input_pipeline.prepare.corpus import cache_folder

    try:
        folder = cache_folder() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        hint = "" if "XDG_CACHE_HOME" in str(error) else "; XDG_CACHE_HOME names another folder"
        log.warning("compiled programs are not kept for the next run (%s%s)", error, hint)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
