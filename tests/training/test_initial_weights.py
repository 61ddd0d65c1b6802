"""--init_from: what is taken from another run, layer by layer, what is not, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.config import ConfigError, override, parse_flags
from sympow_jax.files import read_json, write_json_atomic
from sympow_jax.models.model import Model
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.initial_weights import RECORD, plan_initial_weights
from sympow_jax.training.manifest import CheckpointError
from tests.sharding.test_agreement import in_processes

CONFIG = parse_flags([f"--config={pathlib.Path(__file__).parents[2]}/configs/quickstart.py:fox"])
LAYERS = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 3, 3))  # layer n holds n
SAVED = {"embedding": jnp.ones((5, 3)), "blocks_0": {"kernel": LAYERS, "gate": jnp.ones((4, 3))}}


class Fixed(Model):
    """Stands for a model with these parameters."""

    def __init__(self, params, changes=()):
        super().__init__(override(CONFIG, dict(changes)), vocab_size=1)
        self.params = params

    def init(self, key):
        return self.params


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of four equal layers with steps 1 (the best) and 2."""
    workdir = tmp_path_factory.mktemp("runs") / "source"
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        for step, loss in ((1, 1.0), (2, 2.0)):
            params = {**SAVED, "embedding": SAVED["embedding"] * step}
            tree = {"params": params, "opt_state": {"count": jnp.int32(step)}}
            checkpointer.save(step, tree, metadata={}, metrics={"heldout_loss": loss})
    write_json_atomic(workdir / "data.json", {"tokenizer_digest": "bytes"})
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    return workdir


def plan(source, workdir, params, tokenizer="bytes", *, begun=False, allow="", pattern=("attention",)):
    model = Fixed(params, {"attention.layer_pattern": pattern})
    return plan_initial_weights(str(source), str(workdir), model, tokenizer, has_checkpoints=begun, allow=allow)


def test_what_fits_is_taken_and_the_rest_is_listed(source, tmp_path):
    block = {"kernel": jnp.zeros((4, 3, 4)), "bias": jnp.zeros((4, 4))}
    fresh = {"embedding": jnp.zeros((5, 3)), "blocks_0": block}
    initial = plan(source, tmp_path, fresh, "words", allow="layers/*/kernel, layers/*/bias")
    assert initial.step == 2 and initial.taken == ["embedding"]
    assert initial.unused == [f"layers/{n}/gate" for n in range(4)]
    text = initial.describe()
    assert text.splitlines()[0] == f"starts from 1 of 9 parameters of {source}, step 2"
    assert "layers/2/kernel keeps its initial value: float32[3, 3] there, float32[3, 4] here" in text
    assert "layers/3/bias keeps its initial value: the checkpoint lacks it" in text
    assert "layers/0/gate of the checkpoint is not used" in text and "its tokeniser was another" in text
    params = initial.apply(fresh)
    assert np.all(np.asarray(params["embedding"]) == 2.0)
    assert params["blocks_0"]["kernel"] is block["kernel"] and params["blocks_0"]["bias"] is block["bias"]


@pytest.mark.parametrize("devices", [1, 2])
def test_layers_are_matched_by_their_number_whatever_the_pattern(source, tmp_path, devices):
    """Runs of 1, 2 and 1 layers from one run of four; layer 2 has a gate of its own shape, which starts anew."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": devices, "tensor": 1, "seq": 1}, jax.devices()[:devices])
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P()))  # noqa: E731
    runs = {f"blocks_{i}": {"kernel": place(jnp.full((n, 3, 3), -1.0))} for i, n in enumerate((1, 2, 1))}
    runs["blocks_1"]["gate"] = place(jnp.full((2, 3), -1.0))
    runs["blocks_2"]["gate"] = place(jnp.full((1, 5), -1.0))
    fresh = {"embedding": place(jnp.zeros((5, 3))), **runs}
    pattern = ("attention", "window", "window", "attention")
    initial = plan(source, tmp_path, fresh, allow="layers/3/gate", pattern=pattern)
    params = initial.apply(fresh)
    numbers = [np.unique(np.asarray(layer)) for i in range(3) for layer in params[f"blocks_{i}"]["kernel"]]
    assert [list(n) for n in numbers] == [[0], [1], [2], [3]]
    assert np.all(np.asarray(params["blocks_1"]["gate"]) == 1) and np.all(np.asarray(params["blocks_2"]["gate"]) == -1)
    assert [*initial.kept] == ["layers/3/gate"] and params["blocks_1"]["kernel"].sharding == fresh["embedding"].sharding


def test_part_of_a_run_of_layers_may_start_anew(source, tmp_path):
    """Two layers more than the checkpoint has: they keep their initial values, the four others are taken."""
    fresh = {"embedding": jnp.zeros((5, 3)), "blocks_0": {"kernel": jnp.full((6, 3, 3), -1.0)}}
    model = Fixed(fresh, {"model.num_layers": 6})
    with pytest.raises(ConfigError, match=r"2 of 7 .* first layers/4/kernel .*init_from_allow='layers/\*/kernel'"):
        plan_initial_weights(str(source), str(tmp_path), model, "bytes", has_checkpoints=False)
    initial = plan_initial_weights(
        str(source), str(tmp_path), model, "bytes", has_checkpoints=False, allow="layers/[45]/kernel"
    )
    kernel = np.asarray(initial.apply(fresh)["blocks_0"]["kernel"])
    assert kernel[:, 0, 0].tolist() == [0, 1, 2, 3, -1, -1]


def test_another_vocabulary_is_refused(source, tmp_path):
    fresh = {**SAVED, "embedding": jnp.zeros((7, 3))}
    with pytest.raises(ConfigError, match=r"1 of 9 .* first embedding \(float32\[5, 3\] there, float32\[7, 3\]"):
        plan(source, tmp_path, fresh)
    assert plan(source, tmp_path, fresh, allow="embedding").apply(fresh)["embedding"] is fresh["embedding"]


@pytest.mark.parametrize(("step", "want"), [("", 2), (":latest", 2), (":best", 1), (":1", 1)])
def test_the_step_can_be_chosen(source, tmp_path, step, want):
    initial = plan(f"{source}{step}", tmp_path, SAVED)
    assert initial.step == want and not initial.kept and not initial.unused
    assert float(initial.apply(SAVED)["embedding"][0, 0]) == want


def test_processes_start_from_the_step_that_the_first_one_chooses(source, tmp_path, monkeypatch):
    """The other one sees a step that was written since."""
    later = shutil.copytree(source, tmp_path / "later")
    shutil.copytree(later / "checkpoints" / "2", later / "checkpoints" / "3")
    got, _ = in_processes(2, monkeypatch, lambda i: plan((source, later)[i], tmp_path, SAVED).step)
    assert got == [2, 2]


def test_nothing_that_fits_and_missing_steps_are_errors(source, tmp_path):
    with pytest.raises(ConfigError, match=r"1 of 1 parameters of this model .* first other \(the checkpoint lacks"):
        plan(source, tmp_path, {"other": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match=r":7: no such checkpoint; .* has steps \[1, 2\]"):
        plan(f"{source}:7", tmp_path, SAVED)
    with pytest.raises(CheckpointError, match=r"latest: no such checkpoint; .* has steps \[\]"):
        plan(tmp_path / "absent", tmp_path, SAVED)


def test_the_record_decides_until_the_first_checkpoint_and_another_source_is_refused(source, tmp_path):
    changed = {**SAVED, "embedding": jnp.zeros((7, 3))}
    plan(f"{source}:best", tmp_path, changed, allow="embedding").record(str(tmp_path))
    assert read_json(tmp_path / RECORD)["step"] == 1 and plan("", tmp_path, changed).taken
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
