import io
import json
import logging
import resource
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.training import metrics
from sympow_jax.training.metrics import METRICS_NAME, MetricsWriter, read_metrics


def write_rows(workdir, steps, resume_step=None, **options):
    stream = io.StringIO()
    options = {"tensorboard": False, "stream": stream} | options
    with MetricsWriter(workdir, resume_step=resume_step, total_steps=100, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": 4.0 / step, "tokens": 1000 * step, "tokens_per_sec": 500.0, "mfu": 0.25})
    return stream.getvalue()


def steps_in(workdir):
    return [row["step"] for row in read_metrics(workdir / METRICS_NAME)]


def test_rows_are_one_json_object_a_line_with_keys_in_one_order(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, total_steps=9, tensorboard=False, stream=io.StringIO()) as writer:
        writer.write(3, {"loss": jnp.float32(0.5), "count": np.int64(7), "bad": float("nan"), "note": "é", "a": 1})
    text = (tmp_path / METRICS_NAME).read_text()
    assert text == '{"step": 3, "a": 1, "bad": null, "count": 7, "loss": 0.5, "note": "\\u00e9"}\n'


def test_rows_past_the_restored_step_are_dropped_and_the_rest_is_as_it_was(tmp_path):
    write_rows(tmp_path, range(1, 10))
    before = (tmp_path / METRICS_NAME).read_text().splitlines()
    write_rows(tmp_path, range(6, 10), resume_step=5)
    assert (tmp_path / METRICS_NAME).read_text().splitlines() == before
    write_rows(tmp_path, [1], resume_step=None)
    assert steps_in(tmp_path) == [1]


def test_a_torn_last_line_is_left_out(tmp_path):
    write_rows(tmp_path, range(1, 4))
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-9])
    assert steps_in(tmp_path) == [1, 2]
    write_rows(tmp_path, [3], resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_full_disk_is_reported_once_and_later_rows_are_readable(tmp_path, caplog):
    path = tmp_path / METRICS_NAME
    with MetricsWriter(tmp_path, resume_step=None, total_steps=9, tensorboard=False, stream=io.StringIO()) as writer:
        writer.write(1, {"loss": 1.0})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            writer.write(2, {"note": "x" * (1 << 17)})
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
            writer.write(3, {"loss": 1.0})
            writer.write(4, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write(5, {"loss": 1.0})
    assert steps_in(tmp_path) == [1, 2, 5]
    assert caplog.text.count("metrics.jsonl cannot be written") == 1


def test_a_sink_that_cannot_start_or_dies_does_not_stop_the_others(tmp_path, caplog, monkeypatch):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        write_rows(tmp_path, [1, 2], tensorboard=True, wandb_project="p")
    assert steps_in(tmp_path) == [1, 2]
    assert "TensorBoard cannot be written" in caplog.text and "W&B cannot be written" in caplog.text


def test_a_sink_that_dies_during_the_run_is_reported_once_and_the_others_go_on(tmp_path, caplog, monkeypatch):
    class Wandb:
        """The service goes away after the first row."""

        def init(self, **_):
            return self

        def log(self, row, step):
            if step > 1:
                raise ConnectionError("connection reset by peer")

        def finish(self):
            raise ConnectionError("connection refused")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with caplog.at_level(logging.WARNING):
        text = write_rows(tmp_path, [1, 2, 3], wandb_project="p")
    assert steps_in(tmp_path) == [1, 2, 3] and text.count("\n") == 3
    assert [record.getMessage() for record in caplog.records] == [
        "W&B cannot be written (ConnectionError: connection reset by peer); training continues without it"
    ]


def read_events(path):
    """Records of an event file: length, its checksum, the bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_steps_past_the_restored_one_are_purged(tmp_path):
    write_rows(tmp_path, [1, 2, 3], tensorboard=True)
    first = set((tmp_path / "tensorboard").iterdir())
    write_rows(tmp_path, [3], resume_step=2, tensorboard=True)
    (second,) = set((tmp_path / "tensorboard").iterdir()) - first
    starts = [event.step for event in read_events(second) if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard hides what earlier files hold from this step on
    values = [event for event in read_events(second) if event.HasField("summary")]
    assert {event.step for event in values} == {3} and len(values) == 4


def test_plain_progress_lines_name_throughput_and_time_left(tmp_path):
    text = write_rows(tmp_path, [1, 2])
    assert text.splitlines() == [
        "step 1/100  tok/s 500  MFU 25.0%  loss 4  ETA 3m18s",
        "step 2/100  tok/s 500  MFU 25.0%  loss 2  ETA 3m16s",
    ]


def test_a_terminal_gets_a_live_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with MetricsWriter(tmp_path, resume_step=None, total_steps=9, tensorboard=False, stream=stream) as writer:
        writer.write(4, {"loss": 1.0})
        writer.message("evaluating")
    assert "4/9" in stream.getvalue() and "loss 1" in stream.getvalue() and "evaluating" in stream.getvalue()


def test_every_line_is_strict_json(tmp_path):
    write_rows(tmp_path, range(1, 4))
    for line in (tmp_path / METRICS_NAME).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_lines_that_are_no_rows_are_kept_aside_when_a_resume_writes_the_file_again(tmp_path, caplog):
    write_rows(tmp_path, [1, 2])
    path = tmp_path / METRICS_NAME
    sound = path.read_bytes()
    path.write_bytes(sound + b'{"step": 3, "lo')
    write_rows(tmp_path, [3], resume_step=2)
    assert not list(tmp_path.glob("*.damaged*")) and len(path.read_bytes().splitlines()) == 3
    for number, damage in enumerate((b"a note\n", b'{"step": 1, "loss": NaN}\n', b"\0" * 9 + b"\n")):
        path.write_bytes(damage + sound)
        write_rows(tmp_path, [3], resume_step=2)
        assert (tmp_path / f"{METRICS_NAME}.damaged{number or ''}").read_bytes() == damage + sound
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "line 1: is left out: " in caplog.text and f"is kept as {METRICS_NAME}.damaged2" in caplog.text
    with path.open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match="at most 2,147,483,648 are read"):
        read_metrics(path)


def test_wandb_ids_are_kept_in_the_workdir_and_differ_between_folders_of_one_name(tmp_path):
    old, new = tmp_path / "a" / "fox-seed0", tmp_path / "b" / "fox-seed0"
    for folder in (old, new):
        folder.mkdir(parents=True)
    (old / "wandb").mkdir()  # W&B's own, from before ids were kept
    first = metrics._wandb_id(new)
    assert first != metrics._wandb_id(old) == "fox-seed0"
    (new / "wandb").mkdir()
    assert metrics._wandb_id(new) == first
    assert len(first) == 16 and json.loads((new / "wandb.json").read_text()) == {"id": first}
    (new / "wandb.json").write_text('{"id": 3}')
    with pytest.raises(ValueError, match=r"wandb.json: id = '3' where text is needed"):
        metrics._wandb_id(new)


def test_wandb_gets_the_rows_and_may_die(tmp_path, monkeypatch, caplog):
    """A stand-in for the package, whose run breaks at step 2; the other sinks go on."""
    seen = []

    class FakeRun:
        def log(self, values, step):
            if step == 2:
                raise ConnectionError("gone")
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append("finished")

    class FakeWandb:
        @staticmethod
        def init(**options):
            seen.append((options["project"], options["id"], options["config"]))
            return FakeRun()

    monkeypatch.setitem(__import__("sys").modules, "wandb", FakeWandb)
    with caplog.at_level(logging.WARNING):
        write_rows(tmp_path, [1, 2, 4], wandb_project="p", config={"seed": 3})
    assert seen == [("p", metrics._wandb_id(tmp_path), {"seed": 3}), (1, 4.0), (4, 1.0), "finished"]
    assert caplog.text.count("W&B cannot be written (ConnectionError: gone)") == 1
    assert steps_in(tmp_path) == [1, 2, 4]
