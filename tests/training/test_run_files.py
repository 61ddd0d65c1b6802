"""What a resume may change: stores may move, if they hold the same and are mixed alike."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.files import FileError, write_json_atomic
from sympow_jax.models.model import resolve_implementation
from sympow_jax.training.data import open_run_data
from sympow_jax.training.loop import train
from sympow_jax.training.run_files import check_data, check_resume, save_run_files
from tests.input_pipeline.stores import write_store
from tests.models.small import tiny_config


def config_of(train, heldout, *more):
    flags = (f"data.train={train}", f"data.heldout={heldout}", "mesh.data=1", *more)
    return resolve_implementation(tiny_config("conformal_sympow", *flags))


@pytest.fixture
def workdir(tmp_path, rng):
    """A run on two stores, A three times as often as B, which have moved since; C holds other tokens."""
    for name in "ABC":
        tokens = rng.integers(0, 61, (6, 128)).astype(np.uint16)
        write_store(tmp_path / name, tokens, chunks=(2, 64), vocab_size=61, bos_id=60)
    config = config_of(f"{tmp_path}/A@3,{tmp_path}/B", tmp_path / "B")
    (tmp_path / "run").mkdir()
    save_run_files(config, str(tmp_path / "run"), open_run_data(config))
    shutil.move(tmp_path / "A", tmp_path / "elsewhere")
    return tmp_path / "run"


def test_stores_with_the_same_content_may_lie_elsewhere(tmp_path, workdir):
    moved = config_of(f"{tmp_path}/elsewhere@3,{tmp_path}/B", tmp_path / "B")
    check_resume(moved, str(workdir))
    check_data(str(workdir), open_run_data(moved))
    other = config_of(f"{tmp_path}/C@3,{tmp_path}/B", tmp_path / "B")
    check_resume(other, str(workdir))
    with pytest.raises(ConfigError, match=r"data.train_digest: the run .* was trained on"):
        check_data(str(workdir), open_run_data(other))


def test_a_run_of_before_digests_named_the_rows_that_are_there_goes_on(tmp_path, workdir):
    (tmp_path / "elsewhere" / "1.0").unlink()
    config = config_of(tmp_path / "elsewhere", tmp_path / "B", "data.missing_chunks=exclude")
    (tmp_path / "old").mkdir()
    save_run_files(config, str(tmp_path / "old"), open_run_data(config))
    said = (tmp_path / "old" / "data.json").read_text()
    (tmp_path / "old" / "data.json").write_text(re.sub("/rows:[0-9a-f]+", "", said))
    check_data(str(tmp_path / "old"), open_run_data(config))
    (tmp_path / "old" / "data.json").write_text(re.sub("/rows:....", "/rows:0000", said))
    with pytest.raises(ConfigError, match=r"data\.train_digest"):
        check_data(str(tmp_path / "old"), open_run_data(config))


def test_a_mixture_mixed_otherwise_a_task_and_a_run_without_digests_are_refused(tmp_path, workdir):
    for spec in (f"{tmp_path}/elsewhere@2,{tmp_path}/B", f"{tmp_path}/elsewhere"):
        with pytest.raises(ConfigError, match=r"^data.train: differs from the run"):
            check_resume(config_of(spec, tmp_path / "B"), str(workdir))
    with pytest.raises(ConfigError, match=r"^data.heldout, data.train: differs"):
        check_resume(config_of("mqar", "mqar"), str(workdir))
    moved = config_of(f"{tmp_path}/elsewhere@3,{tmp_path}/B", tmp_path / "B")
    (workdir / "data.json").unlink()
    with pytest.raises(ConfigError, match=r"^data.train: differs from the run"):
        check_resume(moved, str(workdir))


def test_layers_in_a_loop_and_one_after_another_continue_each_other(tmp_path, workdir, capsys):
    config = config_of(f"{tmp_path}/elsewhere@3,{tmp_path}/B", tmp_path / "B")
    model = dataclasses.replace(config.model, scan_layers=not config.model.scan_layers)
    check_resume(dataclasses.replace(config, model=model), str(workdir))
    assert "model.scan_layers: True -> False; sums are split otherwise" in capsys.readouterr().out


def test_other_changes_are_refused_as_before(tmp_path, workdir):
    config = config_of(f"{tmp_path}/elsewhere@3,{tmp_path}/B", tmp_path / "B")
    write_json_atomic(workdir / "config.json", dataclasses.asdict(dataclasses.replace(config, seed=7)))
    with pytest.raises(ConfigError, match=r"^seed: differs"):
        check_resume(config, str(workdir))


def test_the_memory_for_chunks_may_change(tmp_path, workdir, capsys):
    check_resume(
        config_of(f"{tmp_path}/elsewhere@3,{tmp_path}/B", tmp_path / "B", "data.cache_bytes=1000"), str(workdir)
    )
    assert "config change: data.cache_bytes: 268435456 -> 1000" in capsys.readouterr().out


def test_a_workdir_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"^--workdir = 'gs://bucket/run': is an address, and a folder is needed"):
        train(config_of("mqar", "mqar"), "gs://bucket/run")
    assert not any(tmp_path.iterdir())
