"""Schedules of kernels, with a compiler that is played: what it dumps, what it says where it fails, what is kept."""

import subprocess
import types

import pytest

from sympow_jax import config as config_lib
from sympow_jax.planning import fit, schedules
from sympow_jax.planning.errors import PlanError
from sympow_jax.planning.hlo import Shape
from sympow_jax.planning.kernels import Call
from sympow_jax.planning.targets import DEVICES, Target

V5E = Target("v5e:1x1", DEVICES["v5e"], (1, 1), ())
CALL = Call("mine", None, 1.0, (Shape("bf16", (8, 64)),), (Shape("bf16", (8, 64)),), "{}", 0)
DUMP = "utilization\nMXU, XLU\n2 1\n-\n1 0\n0 1\n2 0\n0 0\n"


@pytest.fixture
def compiler(monkeypatch):
    """Calls of the process that compiles a kernel, which dumps `files` and ends with `code` and `stderr`."""
    played = types.SimpleNamespace(environments=[], files={"a": DUMP}, code=0, stderr="")

    def run(command, env, **_):
        played.environments.append(env)
        (folder,) = (flag.partition("=")[2] for flag in env["LIBTPU_INIT_ARGS"].split() if "dump_to" in flag)
        for name, text in played.files.items():
            with open(f"{folder}/{name}-final_hlo-static-per-bundle-utilization.txt", "w") as file:
                file.write(text)
        return subprocess.CompletedProcess(command, played.code, stderr=played.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    return played


def test_the_largest_program_is_read_and_kept(compiler, tmp_path):
    compiler.files["b"] = DUMP.replace("0 0\n", "")
    for _ in range(2):
        assert schedules.schedule(CALL, V5E, tmp_path) == schedules.Schedule(4, 3 / 8)
    assert len(compiler.environments) == 1


def test_the_compilers_flags_are_those_of_the_environment_and_make_another_schedule(compiler, tmp_path, monkeypatch):
    schedules.schedule(CALL, V5E, tmp_path)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=1")
    schedules.schedule(CALL, V5E, tmp_path)
    assert len(compiler.environments) == 2
    assert compiler.environments[1]["LIBTPU_INIT_ARGS"].startswith("--xla_a=1 --xla_jf_dump_to=")


@pytest.mark.parametrize("content", ["", '{"bundles": 4, ', "{}", "[]"])
def test_what_cannot_be_read_is_made_again(content, compiler, tmp_path):
    found = schedules.schedule(CALL, V5E, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert schedules.schedule(CALL, V5E, tmp_path) == found
    assert schedules.schedule(CALL, V5E, tmp_path) == found
    assert len(compiler.environments) == 2


@pytest.mark.parametrize(
    ("code", "stderr", "files", "says"),
    [
        (1, "Traceback\nValueError: no target\n", {}, "exit 1: ValueError: no target; plan without --kernels"),
        (-9, "\n", {}, "exit -9: no word; plan without --kernels"),
        (0, "", {}, "no schedule was dumped"),
    ],
)
def test_a_kernel_without_a_schedule_is_a_plan_that_says_so(code, stderr, files, says, compiler, tmp_path, monkeypatch):
    compiler.code, compiler.stderr, compiler.files = code, stderr, files
    with pytest.raises(PlanError) as caught:
        schedules.schedule(CALL, V5E, tmp_path)
    assert caught.value.kind == "kernel" and says in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fit, "build", lambda *_: None)
    monkeypatch.setattr(fit, "plan", lambda built, target, schedule: schedule(CALL))
    config = config_lib.parse_flags(["--config=configs/quickstart.py"])
    result = fit.try_plan(config, 257, V5E, tmp_path, kernels=True)
    assert result["status"] == "kernel error" and says in result["reason"]
