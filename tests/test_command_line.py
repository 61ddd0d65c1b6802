"""What all commands share: flags within bounds, one line for an error, and environments that lack something."""

import logging
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import command_line, generate, inspect, plan, sharding, sweep, verify_resume
from sympow_jax.command_line import flag_value, one_line_errors, split_flags, step_flag, use_compilation_cache
from sympow_jax.config import ConfigError
from sympow_jax.input_pipeline.prepare import corpus
from tests.models.small import ROOT

QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


def test_step_is_latest_best_or_a_number():
    assert [step_flag({"step": text}) for text in ("latest", "best", "0", "0800")] == ["latest", "best", 0, 800]
    assert step_flag({}) == "latest"
    for wrong in ("lastest", "-1", "1.5", "²", "١"):
        with pytest.raises(ConfigError, match="choose latest, best or a step number"):
            step_flag({"step": wrong})


def test_numbers_of_flags_are_within_bounds_and_differ():
    assert flag_value({"n": "8,16"}, "n", (1,), least=1) == (8, 16)
    assert flag_value({}, "n", 7, least=9) == 7  # the default is the caller's
    for text, default, message in [
        ("", (1,), r"--n = \(\): empty"),
        ("8,0", (1,), "--n = 0: must be from 1 to 99"),
        ("8,-8", (1,), "--n = -8: must be from 1 to 99"),
        ("8,8", (1,), "--n = 8,8: 8 is there twice"),
        ("100", 1, "--n = 100: must be from 1 to 99"),
        ("nan", 1.0, "--n = nan: must be from 1 to 99"),
        ("many", 1, "expected int"),
        (str(2**63), 1, "--n = 9223372036854775808: is beyond 64 bits"),
    ]:
        with pytest.raises(ConfigError, match=message):
            flag_value({"n": text}, "n", default, least=1, most=99)


def test_an_empty_value_is_no_value():
    assert split_flags(["--prompt="], ("prompt",), may_be_empty=("prompt",)) == ({"prompt": ""}, [])
    for flag in ("--workdir=", "--workdir"):
        with pytest.raises(ConfigError, match=r"--workdir needs a value: --workdir=VALUE$"):
            split_flags([flag], ("workdir",))
    with pytest.raises(ConfigError, match=r"^--strict takes no value: write --strict, or leave it out$"):
        split_flags(["--strict=true"], ("workdir",), switches=("strict",))


def join(argv):
    with command_line.joined_processes(split_flags(argv, command_line.PROCESS_FLAGS)[0]):
        return 0


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (
            generate.run,
            ["--workdir=W", "--prompt=x", "--batch=9999999999"],
            "--batch = 9999999999: must be from 1 to 2,147",
        ),
        (generate.run, ["--workdir=W", "--prompt=x", "--max_new_tokens=9999999999"], "must be from 0 to 2,147,483,647"),
        (inspect.run, ["--workdir=W", "--config.seed=1"], "--config.seed=1: the settings of --workdir=W"),
        (inspect.run, [QUICKSTART, "--batch=3"], "--batch: belongs to a run"),
        (plan.run, [QUICKSTART, "--topology=v5e:4x4", "--max_compiles=0"], "--max_compiles = 0: must be at least 1"),
        (plan.run, [QUICKSTART, "--topology=v5e:4x4", "--output=config"], "config.json is there and holds no plans"),
        (sweep.run, [QUICKSTART, "--variants=fox", "--root=R", "--seeds=-1"], "--seeds = -1: must be at least 0"),
        (sweep.run, [QUICKSTART, "--variants=fox", "--root=R", "--lengths=64,64"], "64 is there twice"),
        (sweep.run, [QUICKSTART, "--variants=fox", "--root="], "--root needs a value"),
        (verify_resume.run, [QUICKSTART, "--steps=1"], "--steps = 1: must be at least 2"),
        (verify_resume.run, [QUICKSTART, "--kills=-1"], "--kills = -1: must be at least 0"),
        (verify_resume.run, [QUICKSTART, "--every=²"], "expected int"),
        (verify_resume.run, [QUICKSTART, "--root=."], "--root = '.': is there already; name a new folder"),
        (verify_resume.run, [QUICKSTART, "--heartbeat_seconds=4"], "= 4.0: must be from 5 to 604,800"),
        (verify_resume.run, [QUICKSTART, "--heartbeat_seconds=1e10"], "must be from 5 to 604,800"),
        (join, ["--heartbeat_seconds=1e10"], "--heartbeat_seconds = 10000000000.0: must be from 5 to 604,800"),
    ],
)
def test_wrong_flags_are_one_line_and_write_nothing(run, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("config.json").write_text('{"seed": 0}')
    assert one_line_errors(run, flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir() == ["config.json"] and pathlib.Path("config.json").read_text() == '{"seed": 0}'


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: np.zeros(10**15), "Unable to allocate 7.11 PiB for an array"),
        (lambda: jnp.zeros(10**15, jnp.int8), "RESOURCE_EXHAUSTED: Out of memory allocating 1000000000000000 bytes."),
    ],
)
def test_more_memory_than_there_is_is_one_line_with_the_bytes_and_the_knobs(ask, said, capsys):
    assert one_line_errors(lambda _: ask(), []) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"error: out of memory ({said}" in error
    assert {"--max_new_tokens", "data.batch_size", "--lengths"} <= {*error.replace(",", " ").split()}


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (command_line.Terminated(), 143)]
)
@pytest.mark.parametrize("joined", [False, True])
def test_an_interrupted_process_that_is_joined_to_others_does_not_wait_for_them(error, code, joined, monkeypatch):
    def run(_):
        raise error

    def leave(code):
        raise SystemExit(f"at once with {code}")

    monkeypatch.setattr(command_line, "_is_joined", lambda: joined)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(command_line.gc, "set_threshold", lambda _: None)
    monkeypatch.setattr(command_line.os, "dup2", lambda *_: None)
    monkeypatch.setattr(command_line.os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        command_line.run_program(run)
    assert ended.value.code == (f"at once with {code}" if joined else code)


@pytest.mark.parametrize("polls", [False, True])
def test_sigterm_of_a_joined_process_is_an_error_unless_it_polls(polls, monkeypatch):
    monkeypatch.setattr(sharding, "join_processes", lambda **_: None)
    monkeypatch.setattr(command_line, "_is_joined", lambda: True)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("by JAX"))
    try:
        with command_line.joined_processes({}, polls=polls):
            os.kill(os.getpid(), signal.SIGTERM)
    except command_line.Terminated:
        heard.append("by us")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == (["by JAX"] if polls else ["by us"])


def test_an_error_of_the_program_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        one_line_errors(lambda _: 1 // 0, [])


def test_without_a_cache_folder_programs_are_compiled_anew_and_a_warning_says_so(monkeypatch, tmp_path, caplog):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: updates.append(setting))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    (tmp_path / "file").touch()
    for setting, said in (("", "no home folder"), (f"{tmp_path}/file", "Not a directory")):
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
        caplog.clear()
        use_compilation_cache()
        assert [record.levelno for record in caplog.records] == [logging.WARNING] and updates == []
        assert said in caplog.text and caplog.text.count("XDG_CACHE_HOME") == 1
    monkeypatch.setattr(command_line.os, "access", lambda *_: False)  # a file system that is only read
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    use_compilation_cache()
    assert "cannot be written" in caplog.text and updates == []
    monkeypatch.undo()


def test_the_default_corpus_says_which_variable_moves_it(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/file")
    monkeypatch.setattr(corpus.PythonStdlib, "describe", lambda _: {"python": "3"})
    with pytest.raises(OSError, match=r"python-stdlib: cannot be kept in .* set XDG_CACHE_HOME to a folder"):
        corpus.default_corpus()


def command(*arguments, stdout=subprocess.PIPE, **environment):
    """A command of the scripts in a process of its own: (exit code, standard output, standard error)."""
    settings = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=settings, stdout=stdout, stderr=subprocess.PIPE, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_tables_on_a_terminal_of_ascii():
    code, out, err = command("train.py", "--list", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert code == 0 and err == b"" and out.isascii()
    assert b"| softmax_kerple_power " in out and b"?" not in out


@pytest.mark.slow
def test_who_reads_the_output_may_go_and_a_full_disk_is_one_line():
    reading, writing = os.pipe()
    os.close(reading)
    for arguments in (("plan", "--list"), ("prepare", "verify", "/absent"), ("train", "--list")):  # train shows a table
        code, _, err = command("-m", f"sympow_jax.{arguments[0]}", *arguments[1:], stdout=writing)
        assert (code, err) == (141, b"")
    os.close(writing)
    with open("/dev/full", "w") as full:
        code, _, err = command("-m", "sympow_jax.plan", "--list", stdout=full)
    assert code == 1 and err == b"error: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line():
    code, out, err = command("-m", "sympow_jax.inspect", QUICKSTART, JAX_PLATFORMS="cuda")
    assert (code, out) == (1, b"")
    assert err.splitlines()[-1].startswith(b"error: JAX_PLATFORMS = 'cuda': is not there")
    assert b"Traceback" not in err
