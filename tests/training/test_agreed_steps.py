"""Which steps several processes read and save, where they see different folders: what the first one sees."""

import numpy as np
import pytest

from sympow_jax.training.checkpoint import Checkpointer
from tests.sharding.test_agreement import in_processes


@pytest.fixture
def folders(tmp_path):
    """Of three processes: a trainer writes step 3, with the best loss, while they look."""
    folders = []
    for index, steps in enumerate([(1, 2), (1, 2, 3), ()]):
        folders.append(Checkpointer(tmp_path / str(index)))
        for step in steps:
            folders[-1].save(step, {"x": np.full(1, step)}, metadata={}, metrics={"heldout_loss": step % 3})
        folders[-1].wait()
    return folders


@pytest.mark.parametrize(("step", "want"), [("latest", [2, 1]), ("best", [1, 2]), (2, [2])])
def test_the_steps_to_try_are_those_of_the_first_process(folders, step, want, monkeypatch):
    got, _ = in_processes(3, monkeypatch, lambda i: folders[i]._folders.candidates(step))
    assert got == [want] * 3


def test_a_step_that_the_first_process_lacks_is_an_error_of_all(folders, monkeypatch):
    got, _ = in_processes(3, monkeypatch, lambda i: folders[i]._folders.candidates(3))
    assert got == [f"step=3 is not in {folders[0].directory}; choose latest, best or one of [1, 2]"] * 3


def test_whether_a_step_is_saved_already_is_known_to_the_first_process(folders, monkeypatch):
    got, _ = in_processes(3, monkeypatch, lambda i: folders[i].save(2, {"x": np.full(1, 2)}, metadata={}))
    assert got == [False] * 3
