"""--init_from: what is taken from another run, what is not, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import ConfigError
from sympow_jax.files import read_json, write_json_atomic
from sympow_jax.models.model import Model
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.initial_weights import RECORD, plan_initial_weights
from sympow_jax.training.manifest import CheckpointError
from tests.models.small import tiny_config

SAVED = {"embedding": jnp.ones((5, 3)), "block": {"kernel": jnp.full((3, 3), 2.0), "gate": jnp.ones(3)}}


class Fixed(Model):
    """Stands for a model with these parameters."""

    def __init__(self, params):
        super().__init__(tiny_config("sympow"), vocab_size=1)
        self.params = params

    def init(self, key):
        return self.params


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with steps 1 (the best) and 2."""
    workdir = tmp_path_factory.mktemp("runs") / "source"
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        for step, loss in ((1, 1.0), (2, 2.0)):
            params = {**SAVED, "embedding": SAVED["embedding"] * step}
            tree = {"params": params, "opt_state": {"count": jnp.int32(step)}}
            checkpointer.save(step, tree, metadata={}, metrics={"heldout_loss": loss})
    write_json_atomic(workdir / "data.json", {"tokenizer_digest": "bytes"})
    return workdir


def plan(source, workdir, params, tokenizer="bytes", *, begun=False):
    return plan_initial_weights(str(source), str(workdir), Fixed(params), tokenizer, has_checkpoints=begun)


def test_what_fits_is_taken_and_the_rest_is_listed(source, tmp_path):
    fresh = {"embedding": jnp.zeros((5, 3)), "block": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
    initial = plan(source, tmp_path, fresh, "words")
    assert initial.step == 2 and initial.taken == ["params/embedding"] and initial.unused == ["params/block/gate"]
    text = initial.describe()
    assert text.splitlines()[0] == f"starts from 1 of 3 arrays of {source}, step 2"
    assert "params/block/kernel keeps its initial value: float32[3, 3] there, float32[3, 4] here" in text
    assert "params/block/bias keeps its initial value: the checkpoint lacks it" in text
    assert "params/block/gate of the checkpoint is not used" in text and "its tokeniser was another" in text
    params = initial.apply(fresh)
    assert np.all(np.asarray(params["embedding"]) == 2.0)
    assert params["block"]["kernel"] is fresh["block"]["kernel"] and params["block"]["bias"] is fresh["block"]["bias"]


@pytest.mark.parametrize(("step", "want"), [("", 2), (":latest", 2), (":best", 1), (":1", 1)])
def test_the_step_can_be_chosen(source, tmp_path, step, want):
    initial = plan(f"{source}{step}", tmp_path, SAVED)
    assert initial.step == want and not initial.kept and not initial.unused
    assert float(initial.apply(SAVED)["embedding"][0, 0]) == want


def test_nothing_that_fits_and_missing_steps_are_errors(source, tmp_path):
    with pytest.raises(ConfigError, match=r"none of its 3 arrays fits this model \(params/other: the checkpoint lacks"):
        plan(source, tmp_path, {"other": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match=r":7: no such checkpoint; .* has steps \[1, 2\]"):
        plan(f"{source}:7", tmp_path, SAVED)
    with pytest.raises(CheckpointError, match=r"latest: no such checkpoint; .* has steps \[\]"):
        plan(tmp_path / "absent", tmp_path, SAVED)


def test_the_record_decides_until_the_first_checkpoint_and_another_source_is_refused(source, tmp_path):
    plan(f"{source}:best", tmp_path, SAVED).record(str(tmp_path))
    assert read_json(tmp_path / RECORD)["step"] == 1
    for again in ("", source, f"{source}:best", f"{source}:1"):
        assert plan(again, tmp_path, SAVED).step == 1
        assert plan(again, tmp_path, SAVED, begun=True) is None
    for other in (f"{source}:2", tmp_path):
        with pytest.raises(ConfigError, match=r"started from .*source:1; use another workdir"):
            plan(other, tmp_path, SAVED, begun=True)


def test_a_run_that_began_from_scratch_cannot_be_given_weights(source, tmp_path):
    assert plan("", tmp_path, SAVED) is None
    with pytest.raises(ConfigError, match="started from scratch"):
        plan(source, tmp_path, SAVED, begun=True)
