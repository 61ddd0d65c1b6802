"""SLURM's daemons on this machine: docs/launch/slurm.sh with two tasks, preempted, requeued and gone on with."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from sympow_jax.training.run_differences import differences
from tests.training.test_faults import FLAGS, ROOT, last_step
from tests.training.test_processes import free_port

_ABSENT = [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_ABSENT), reason=f"no {', '.join(_ABSENT)} here; Debian's slurmctld, slurmd, slurm-client"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd runs as root"),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
JOB = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--partition=low")
STEPS = 150


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[pathlib.Path]:
    """A folder to submit from, where a cluster of this machine is up."""
    folder, clone = tmp_path / "slurm", tmp_path / "clone"
    for path in (folder / "state", folder / "spool", clone / ".venv" / "bin"):
        path.mkdir(parents=True)
    values = {"host": socket.gethostname().split(".")[0], "controller": free_port(), "node": free_port()}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, cpus=os.cpu_count(), **values))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # jobs have the submitter's environment; see plain_environment
    python = pathlib.Path(sys.executable).parent
    (clone / ".venv" / "bin" / "activate").write_text(f"export PATH={python}:$PATH PYTHONPATH={ROOT}\n")
    for name in ("train.py", "configs"):
        (clone / name).symlink_to(ROOT / name)
    log = (folder / "log").open("w")
    daemons = [subprocess.Popen([name, "-D"], stdout=log, stderr=log, cwd=folder) for name in ("slurmctld", "slurmd")]
    try:
        wait(lambda: "idle" in output("sinfo", "-h"), 60)
        yield clone
    finally:
        subprocess.run(["scancel", "--user=root"], timeout=60)
        for daemon in daemons[::-1]:
            daemon.terminate()
            daemon.wait(60)
        log.close()


def output(*command: str, cwd: pathlib.Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60).stdout.strip()


def wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, output("squeue")
        time.sleep(0.2)


def submit(clone: pathlib.Path, workdir: pathlib.Path) -> str:
    changes = FLAGS | {"num_train_steps": STEPS, "checkpoint.every_steps": 1_000, "evaluation.every_steps": 0}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    script = (ROOT / "docs" / "launch" / "slurm.sh", "--config=configs/quickstart.py:conformal_sympow")
    log = f"--output={workdir}.log"
    return output("sbatch", "--parsable", *JOB, log, *map(str, script), f"--workdir={workdir}", *flags, cwd=clone)


def state(job: str) -> str:
    return output("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def test_a_preempted_job_requeues_itself_and_ends_with_the_same_bits(slurm, tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    ended = lambda job: state(job) in ("COMPLETED", "FAILED")  # noqa: E731
    job = submit(slurm, straight)
    wait(lambda: ended(job), 300)
    assert state(job) == "COMPLETED", (tmp_path / "straight.log").read_text()
    job = submit(slurm, moved)
    wait(lambda: ended(job) or last_step(moved) > 2, 300)
    output("sbatch", "--partition=high", f"--ntasks={os.cpu_count()}", "--output=/dev/null", "--wrap=sleep 1")
    wait(lambda: ended(job) or state(job) == "PENDING", 120)
    stopped = last_step(moved)
    assert 2 < stopped < STEPS and (moved / "checkpoints" / str(stopped)).is_dir()
    wait(lambda: ended(job), 300)
    assert state(job) == "COMPLETED", (tmp_path / "moved.log").read_text()
    assert differences(straight, moved) == []
