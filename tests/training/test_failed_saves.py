"""Saves that fail, with or without a word of Orbax: what is reported, tried again, given up and left behind."""

import asyncio
import contextlib
import gc
import logging
import resource
import shutil
import sys
import types
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sympow_jax.training import checkpoint
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import CheckpointError
from tests.training.test_checkpoint import assert_equal, damaged, like, sound

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, after an error
__all__ = ["damaged", "sound"]  # fixtures


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(damaged):
    shutil.copytree(damaged / "2", damaged / "3.orbax-checkpoint-tmp")
    (damaged / "1.deleted.orbax-checkpoint-tmp").mkdir()
    assert Checkpointer(damaged, read_only=True).steps() == [1, 2]
    assert len(list(damaged.iterdir())) == 4
    Checkpointer(damaged).close()
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2"]


@contextlib.contextmanager
def full_disk():
    """No file may grow past 64 KiB, which a checkpoint of `big_tree` needs: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big_tree() -> dict:
    return {"x": np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)}


def test_a_failed_save_is_reported_and_training_goes_on(damaged, caplog):
    with Checkpointer(damaged) as checkpointer:
        with full_disk():
            assert checkpointer.save(3, big_tree(), metadata={})
            checkpointer.wait()
        assert "saving step 3" in caplog.text and "newest checkpoint on disk: 2" in caplog.text
        assert "File too large" in caplog.text and "Traceback" not in caplog.text
        assert sorted(path.name for path in damaged.iterdir()) == ["1", "2"]
        assert checkpointer.save(4, big_tree(), metadata={})
        restored = checkpointer.restore(like=like(big_tree()))
    assert restored.step == 4
    assert_equal(restored.tree, big_tree())


def test_one_failure_is_one_report_however_many_arrays_fail(tmp_path, caplog):
    tree = {f"array {number}": big_tree()["x"] for number in range(16)}
    with Checkpointer(tmp_path, max_failures=9) as checkpointer:
        with full_disk():
            for step in range(4):
                checkpointer.save(step, tree, metadata={})
            checkpointer.wait()
        gc.collect()
    assert [record.name for record in caplog.records] == ["sympow_jax.training.checkpoint"] * 4


def test_late_reports_of_orbax_failures_are_dropped_and_others_are_not(caplog):
    Checkpointer("unused", read_only=True)
    for fail in (lambda: ocp.AsyncCheckpointer(ocp.JsonCheckpointHandler(), timeout_secs=-1), lambda: 1 / 0):
        try:
            fail()
        except (ValueError, ZeroDivisionError) as error:  # as asyncio does for the other writes of a failed save
            logging.getLogger("asyncio").error("exception was never retrieved", exc_info=error)
    loop = asyncio.new_event_loop()
    for message in ("Error writing /run/checkpoints/7.orbax-checkpoint-tmp/state", "Error reading OCDBT", "other"):
        loop.create_future().set_exception(ValueError(message))  # collected at once, as if by a failed save or read
    loop.close()
    assert [str(record.exc_info[1]) for record in caplog.records] == ["division by zero", "other"]


@pytest.mark.parametrize(
    ("file", "name", "reports"), [("/python/orbax/serialization.py", "write_fragment", 0), ("/python/other.py", "x", 1)]
)
def test_writes_that_orbax_never_started_are_dropped_without_a_word(monkeypatch, file, name, reports):
    heard, defined = [], {}
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(repr(unraisable.exc_value)))
    exec(compile(f"async def {name}(): pass", file, "exec"), defined)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Checkpointer("unused", read_only=True)
        defined[name]()
        last = [defined[name]()]
        eval("last.clear()", {"__builtins__": {}, "last": last})  # as in namedtuple's __new__: nothing can be imported
    assert "KeyError('__import__')" in heard if reports else not heard
    assert not warned  # whose coroutine it was is not in a warning, and the package has none of its own


def test_the_last_save_is_tried_whatever_failed_before_and_what_failed_is_named(tmp_path, monkeypatch):
    """The second failure in a row is known only when the last save begins: that one is made all the same."""
    tree = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path, max_failures=2) as checkpointer:
        full = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer, "_check_writable", full)
            checkpointer.save(1, tree, metadata={})
        checkpointer.save(2, tree, metadata={})
        wait = checkpointer._orbax.wait_until_finished
        late = mock.Mock(side_effect=[OSError(28, "No space left on device"), *[None] * 9])
        monkeypatch.setattr(checkpointer._orbax, "wait_until_finished", lambda: (wait(), late()))
        checkpointer.save(3, tree, metadata={}, force=True)
        assert checkpointer.failed_steps == [1, 2] and 3 in checkpointer.steps()


def test_an_event_loop_for_which_no_file_was_left_is_dropped_without_a_word(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    Checkpointer("unused", read_only=True)
    for text in ("'_UnixSelectorEventLoop' object has no attribute '_ssock'", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=AttributeError(text), object=None))
    assert heard == ["another"]


def test_failures_in_a_row_stop_the_run(damaged):
    with Checkpointer(damaged, max_failures=2, asynchronous=False) as checkpointer:
        with full_disk():
            checkpointer.save(3, big_tree(), metadata={})
            with pytest.raises(CheckpointError, match=r"saving step 4 .*2 saves failed in a row"):
                checkpointer.save(4, big_tree(), metadata={})
        assert checkpointer.steps() == [1, 2]


def test_the_last_save_is_retried_until_it_is_on_disk(damaged, monkeypatch, caplog):
    monkeypatch.setattr("sympow_jax.training.checkpoint._RETRY_SECONDS", (0.01, 0.01))
    with Checkpointer(damaged) as checkpointer:
        with full_disk(), pytest.raises(CheckpointError, match="saving step 3"):
            checkpointer.save(3, big_tree(), metadata={}, force=True)
        assert caplog.text.count("trying again") == 2
        assert checkpointer.save(3, big_tree(), metadata={}, force=True)
        assert checkpointer.steps() == [1, 2, 3]


def test_what_one_process_cannot_write_no_process_begins_to(tmp_path, monkeypatch):
    """All of them meet it before Orbax does; what fails later in one alone ends the run."""
    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpoint, "gather", lambda topic, mine: [mine, "[Errno 28] No space left on device"])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(checkpoint.NotWritableError, match=r"^process 1: \[Errno 28\] No space left"):
            checkpointer._check_writable(1)
        assert not checkpoint._leaves_others_waiting(checkpoint.NotWritableError("x"))
        with pytest.raises(CheckpointError, match=r"No space left.*; free space or fix the folder and start again"):
            checkpointer._note_failure(OSError(28, "No space left on device"))
        monkeypatch.undo()
        checkpointer._check_writable(1)
