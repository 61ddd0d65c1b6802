"""No link of a workdir is followed: neither written through nor read."""

import numpy as np
import pytest

from sympow_jax import config as config_lib
from sympow_jax import report
from sympow_jax.evals.files import write_result
from sympow_jax.files import FileError
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.loading import load_step
from sympow_jax.plots import style
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.loop import train
from sympow_jax.training.metrics import MetricsWriter
from sympow_jax.training.workdir import WorkdirError, WorkdirLock
from tests.test_report import make_run

PLACES = (
    "config.json", "data.json", "init_from.json", "metrics.jsonl", ".lock", "checkpoints", "checkpoints/8", "eval",
    "eval/x.json", "eval/x.npz", "eval/x.png", "profile", "tensorboard", "tokenizer", "tokenizer/spec.json", "wandb",
)  # fmt: skip


@pytest.fixture
def outside(tmp_path):
    """A file and a folder that nothing may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("theirs")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "theirs"


def link(path, outside):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "file" if path.suffix or path.name == ".lock" else outside)


@pytest.mark.parametrize("place", PLACES)
def test_every_command_refuses_a_workdir_with_a_link(tmp_path, outside, place):
    folder = make_run(tmp_path / "run", "sympow", evaluated=False)
    link(tmp_path / "run" / place, outside)
    config = config_lib.parse_flags(["--config=configs/quickstart.py:sympow"])
    for action in (lambda: train(config, folder), lambda: load_step(folder), lambda: report.gather([folder])):
        with pytest.raises(FileError, match="is a link to") as caught:
            action()
        assert str(tmp_path / "run" / place) in str(caught.value) and "\n" not in str(caught.value)


def test_a_new_run_refuses_one_too(tmp_path, outside):
    link(tmp_path / "run" / "metrics.jsonl", outside)
    with pytest.raises(FileError, match=r"metrics\.jsonl: is a link"):
        train(config_lib.parse_flags(["--config=configs/quickstart.py:sympow"]), str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_each_writer_refuses_a_link_by_itself(tmp_path, outside):
    folder = tmp_path / "run"
    for name in (".lock", "metrics.jsonl", "tokenizer/spec.json", "eval/x.npz", "checkpoints"):
        link(folder / name, outside)
    with pytest.raises(WorkdirError, match="is a link"):
        WorkdirLock(folder).acquire()
    with pytest.raises(FileError, match="is a link"):
        ByteTokenizer().save(folder / "tokenizer")
    with pytest.raises(FileError, match="is a link"):
        write_result(folder / "eval", "x", {}, {"a": np.zeros(2)})
    for read_only in (True, False):
        with pytest.raises(FileError, match="is a link"):
            Checkpointer(folder / "checkpoints", read_only=read_only)
    with MetricsWriter(folder, resume_step=None, total_steps=1, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})


def test_a_figure_takes_the_place_of_a_link(tmp_path, outside):
    from matplotlib.figure import Figure

    link(tmp_path / "x.png", outside)
    style.save(Figure(), tmp_path / "x.png", dpi=10)
    assert not (tmp_path / "x.png").is_symlink()


def test_a_linked_workdir_is_no_fault(tmp_path):
    folder = make_run(tmp_path / "run", "sympow")
    (tmp_path / "alias").symlink_to("run")
    page = report.gather([str(tmp_path / "alias")])
    assert len(page["evaluations"]) == 1 and folder
