"""Proves on this machine, with this config, that killed and resumed training equals uninterrupted training.

    python -m sympow_jax.verify_resume --config=configs/NAME.py[:VARIANT] [--config.a.b=v ...]
        [--steps=20] [--kills=1] [--every=5] [--seed=0] [--root=DIR] [--processes=1] [--heartbeat_seconds=10]

Trains `steps` steps once without a break. Then trains the same again, killed with kill -9 at `kills` random moments,
every second one inside a save, and started again each time, with a checkpoint every `every` steps. Every array of the
two last checkpoints and every metric but the timings must be equal, bit for bit. On GPUs, bitwise equal training may
need XLA_FLAGS=--xla_gpu_deterministic_ops=true.

With --processes=2,1,4 each start takes the next of these numbers of processes on this machine, with mesh.cpu_devices
each, and one of them is killed. The others must end with exit code 1 and one line that names it, within
`heartbeat_seconds` and 15 more. Other sums are rounded otherwise, so every loss must be within 1e-6 of the
uninterrupted one, which one process has. Steps whose gradient spikes amplify rounding beyond that (RESULTS.md); a small
--config.optimizer.learning_rate keeps it apart from what this looks for.

After each kill the newest checkpoints that were complete before it must be there, and sound. Exits 0 if all of that
is so and 1 if not.
"""

import dataclasses
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from sympow_jax.command_line import (
    HEARTBEAT_BOUNDS,
    PROCESS_FLAGS,
    flag_value,
    joined_processes,
    run_program,
    split_flags,
    use_compilation_cache,
)
from sympow_jax.config import Config, ConfigError, override, parse_flags, resolve
from sympow_jax.files import read_json, write_json_atomic
from sympow_jax.training.cpu_devices import use_cpu_devices
from sympow_jax.training.local_processes import LocalProcesses
from sympow_jax.training.loop import train
from sympow_jax.training.manifest import CheckpointError
from sympow_jax.training.metrics import last_logged_step
from sympow_jax.training.quiet_orbax import TEMPORARY
from sympow_jax.training.run_differences import differences, largest_difference, read_arrays
from sympow_jax.training.step_folders import list_steps
from sympow_jax.training.workdir import WorkdirError

TOLERANCE = 1e-6  # of losses, relative, where numbers of processes differ
_AFTER_HEARTBEAT = 15.0  # seconds: what is left of a start that was killed as its processes met waits 10 longer
_STEP_SECONDS = 600.0  # until a step is reached
_USUAL = ("step ", "waiting ")  # begin lines that a run writes to standard error when all is well
_TRAIN = "--train-from-json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried, and where: the flags of the command."""

    config: Config
    root: pathlib.Path
    steps: int = 20
    kills: int = 1
    every: int = 5
    seed: int = 0
    processes: tuple[int, ...] = (1,)
    heartbeat_seconds: float = 10.0

    def start(self, workdir: pathlib.Path, number: int) -> LocalProcesses:
        """Training in `workdir`, as the start of this number has it."""
        command = [sys.executable, "-m", "sympow_jax.verify_resume", _TRAIN, str(self._config_file), str(workdir)]
        count = self.processes[number % len(self.processes)]
        return LocalProcesses([*command, f"--heartbeat_seconds={self.heartbeat_seconds:g}"], count, workdir)

    def write_config(self) -> None:
        """The config that every start reads."""
        changes = {"num_train_steps": self.steps, "checkpoint.every_steps": self.every, "logging.every_steps": 1}
        write_json_atomic(self._config_file, dataclasses.asdict(override(self.config, changes)))

    @property
    def _config_file(self) -> pathlib.Path:
        return self.root / "config.json"


_BOUNDS = {
    "steps": {"least": 2}, "kills": {"least": 0}, "every": {"least": 1}, "seed": {"least": 0},
    "processes": {"least": 1}, "heartbeat_seconds": HEARTBEAT_BOUNDS,
}  # fmt: skip


def verify(trial: Trial) -> list[str]:
    """Runs the proof; returns what is wrong, nothing if all is well. Prints what it does."""
    trial.write_config()
    straight, broken = trial.root / "straight", trial.root / "broken"
    started = time.monotonic()
    _finish(dataclasses.replace(trial, processes=(1,)).start(straight, 0), straight)
    print(f"uninterrupted: {trial.steps} steps in {time.monotonic() - started:.1f} s", flush=True)
    rng, faults = random.Random(trial.seed), []
    targets = sorted(rng.randrange(1, trial.steps) for _ in range(trial.kills))
    for number, target in enumerate(targets):
        with trial.start(broken, number) as processes:
            stale = _wait_for_moment(processes, broken, target, rng.uniform(0.0, 0.3), in_save=number % 2 == 1)
            story, found = _kill(trial, processes, broken, rng.randrange(len(processes)), stale)
        print(f"kill {number + 1}: {story}", *found, sep="\n  ", flush=True)
        faults += [f"kill {number + 1}: {fault}" for fault in found]
    _finish(trial.start(broken, trial.kills), broken)
    if trial.processes == (1,):
        return faults + differences(straight, broken)
    most = largest_difference(straight, broken)
    print(f"largest relative difference of a loss: {most:.1e}", flush=True)
    return faults + ([f"losses differ by {most:.1e}, more than {TOLERANCE:.0e}"] if most > TOLERANCE else [])


def _finish(processes: LocalProcesses, workdir: pathlib.Path) -> None:
    with processes:
        for index, code in enumerate(processes.wait(float("inf"))):
            if code != 0:
                tail = processes.errors(index)[-2000:]
                raise WorkdirError(f"training in {workdir}: process {index} exited with {code}:\n{tail}")


def _wait_for_moment(
    processes: LocalProcesses, workdir: pathlib.Path, target: int, delay: float, *, in_save: bool
) -> set[str]:
    """Returns `delay` seconds after `target` is logged, or just after a save begins from then on, or when one ended.

    What it returns are the unfinished saves of earlier starts that this one has not removed.
    """
    begun, stale = time.monotonic(), _unfinished(workdir)
    while last_logged_step(workdir) < target or (in_save and not _unfinished(workdir) - stale):
        stale &= _unfinished(workdir)
        if any(code is not None for code in processes.codes()):
            break
        if time.monotonic() - begun > _STEP_SECONDS:
            raise WorkdirError(
                f"training in {workdir} did not reach step {target} in {_STEP_SECONDS:.0f} s; see errors.*.txt there"
            )
        time.sleep(0.002)
    time.sleep(delay / 10 if in_save else delay)
    return stale & _unfinished(workdir)


def _unfinished(workdir: pathlib.Path) -> set[str]:
    """Names of the folders of saves under way; those of deletions and probes have more than a step before the mark."""
    names = {path.name for path in (workdir / "checkpoints").glob(f"*{TEMPORARY}*")}
    return {name for name in names if name.partition(TEMPORARY)[0].isdigit()}


def _kill(
    trial: Trial, processes: LocalProcesses, workdir: pathlib.Path, victim: int, stale: set[str]
) -> tuple[str, list[str]]:
    """Kills one process and waits for the others; what happened, and what of it should not have."""
    step, before = last_logged_step(workdir), list_steps(workdir / "checkpoints")
    processes.kill(victim)
    started = time.monotonic()
    codes = processes.wait(trial.heartbeat_seconds + _AFTER_HEARTBEAT)
    seconds = time.monotonic() - started
    after = list_steps(workdir / "checkpoints")
    story = f"process {victim} of {len(processes)}, after step {step}"
    story += f", inside a save: {'yes' if _unfinished(workdir) - stale else 'no'}"
    story += f", the others ended after {seconds:.1f} s" if len(processes) > 1 else ""
    finished = trial.steps in after and all(code in (0, -signal.SIGKILL) for code in codes)
    faults = [] if finished else _faults_of_ends(processes, codes, victim)
    newest = sorted({*before, *after})[-trial.config.checkpoint.keep_last :]  # the others may finish a save
    faults += _faults_of_checkpoints(workdir, newest, after)
    return f"{story}; the newest checkpoint is {max(after, default=0)}", faults


def _faults_of_ends(processes: LocalProcesses, codes: Sequence[int | None], victim: int) -> list[str]:
    """What is wrong with how processes ended of which one was killed."""
    faults = []
    for index, code in enumerate(codes):
        lines = [line for line in processes.errors(index).splitlines() if not line.startswith(_USUAL)]
        blamed = any(who in "".join(lines) for who in (f"process {victim}", "in vain for the other processes"))
        one_line = len(lines) == 1 and lines[0].startswith("error: ") and blamed
        if code != -signal.SIGKILL if index == victim else not (code == 1 and one_line):
            how = "still runs" if code is None else f"exited with {code}"
            faults.append(f"process {index} {how}: {lines}")
    return faults


def _faults_of_checkpoints(workdir: pathlib.Path, before: Sequence[int], after: Sequence[int]) -> list[str]:
    faults = [f"checkpoint {step} is gone" for step in before if step not in after]
    for step in after:
        try:
            read_arrays(workdir, step)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def _train(argv: Sequence[str]) -> int:
    """One of the processes of a start."""
    config = resolve(read_json(argv[0]))
    own, _ = split_flags(argv[2:], PROCESS_FLAGS)
    use_compilation_cache()
    with joined_processes(own, polls=True):
        use_cpu_devices(config)
        return train(config, argv[1])


def run(argv: Sequence[str]) -> int:
    """Runs the proof that the flags name; returns 0 if all is well and 1 if not."""
    if list(argv[:1]) == [_TRAIN]:
        return _train(argv[1:])
    own, rest = split_flags(argv, [*_BOUNDS, "root"], prefix="config")
    values = {name: flag_value(own, name, getattr(Trial, name), **bounds) for name, bounds in _BOUNDS.items()}
    config = parse_flags(rest)
    use_cpu_devices(config)
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as temporary:
        root = pathlib.Path(own.get("root", temporary))
        if "root" in own and root.exists():
            raise ConfigError(f"--root = {str(root)!r}: is there already; name a new folder")
        root.mkdir(parents=True, exist_ok=True)
        trial = Trial(config, root, **values)
        found = verify(trial)
    if found:
        print("NOT EQUAL:\n  " + "\n  ".join(found))
        return 1
    counts = " and ".join(map(str, trial.processes))
    how = "bit for bit" if trial.processes == (1,) else f"within {TOLERANCE:.0e}, in {counts} processes,"
    print(f"equal {how} after {trial.kills} kill(s) on {jax.device_count()} x {jax.devices()[0].device_kind}")
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    run_program(run)


if __name__ == "__main__":
    main()
