"""What the processes of a run must have in common, with threads for processes."""

import dataclasses
import threading
from unittest import mock

from sympow_jax.training import same_run
from sympow_jax.training.data import RunData
from tests.models.small import tiny_config
from tests.sharding.test_agreement import in_processes


def test_settings_flags_and_versions_that_differ_are_named(monkeypatch):
    config = tiny_config("softmax_rope")
    configs = [config, dataclasses.replace(config, seed=config.seed + 1)]
    monkeypatch.setattr(same_run, "coordination", lambda: ("a client", 0, 2))
    got, _ = in_processes(2, monkeypatch, lambda i: same_run.check_settings(configs[i], strict=i == 1))
    seed = f"seed: {config.seed} in process 0, {config.seed + 1} in process 1"
    assert (
        got[0]
        == got[1]
        == f"{seed}; --strict: false in process 0, true in process 1; start every process with "
        + ("the same flags and software")
    )
    ours, here = same_run.versions(), threading.local()
    monkeypatch.setattr(same_run, "versions", lambda: ours | {"sympow_jax source": f"digest {here.index}"})

    def check(index):
        here.index = index
        same_run.check_settings(config)

    got, _ = in_processes(2, monkeypatch, check)
    assert got[0].startswith('sympow_jax source: "digest 0" in process 0, "digest 1" in process 1; start every')
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sympow_jax"} <= ours.keys()


def test_stores_that_differ_are_named(monkeypatch):
    config = tiny_config("softmax_rope")
    digests = [{"train_digest": "a", "tokenizer_digest": "t"}, {"train_digest": "b", "tokenizer_digest": "t"}]

    def check(index, data):
        same_run.check_same_data(config, mock.Mock(spec=RunData, describe=lambda: data))

    got, _ = in_processes(2, monkeypatch, lambda i: check(i, digests[i]))
    assert got[0] == got[1] and got[0].startswith(
        'data.train_digest: "a" in process 0, "b" in process 1; every process'
    )
    assert in_processes(2, monkeypatch, lambda i: check(i, digests[0]))[0] == [None, None]


def test_a_workdir_that_is_not_one_folder_is_named_and_nothing_stays_in_it(monkeypatch, tmp_path):
    here = threading.local()
    monkeypatch.setattr(same_run, "coordination", lambda: ("a client", here.index, 2))

    def check(folders, index):
        here.index = index
        same_run.check_shared(str(folders[index]), seconds=0.1)

    def processes(*folders):
        return in_processes(2, monkeypatch, lambda i: check(folders, i))[0]

    apart = processes(tmp_path / "a", tmp_path / "b")
    assert all(": process 1 (host " in line and "does not see what process 0 (" in line for line in apart)
    assert processes(tmp_path / "a", tmp_path / "a") == [None, None]
    (tmp_path / "file").write_text("")
    assert all("cannot be written by process 0 (" in line for line in processes(*[tmp_path / "file" / "x"] * 2))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]
