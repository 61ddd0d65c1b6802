"""What may be asked of a trained run, and which files the answer goes to."""

import dataclasses
import json

import numpy as np
import pytest

from sympow_jax import eval as eval_command
from sympow_jax.config import ConfigError, override
from sympow_jax.evals.files import read_arrays, write_result
from sympow_jax.evaluation_request import EvaluationRequest, bias_name, inputs
from sympow_jax.models.model import resolve_implementation
from tests.models.small import tiny_config
from tests.test_sweep import write_checkpoint


def request(task="length_generalisation", **changes):
    asked = {"workdir": "W", "task": task, "lengths": (24, 48), "data": "D", "name": "x", "num_documents": 4}
    asked |= {"num_examples": 8, "pairs": (2,), "depths": (0.5,)}
    return EvaluationRequest(**(asked | changes))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../x", "a/b", "/etc/x", ".hidden", "a\nb", "a\x1b[2J", "a b", "a\\b", "ü", "n" * 101]
)
def test_a_name_stays_in_its_folder(name):
    with pytest.raises(ConfigError, match=r"--name = .*: names files under WORKDIR/eval") as caught:
        request(name=name)
    assert str(caught.value).isprintable()


def test_names_of_other_files_are_reserved():
    for name in ("position_bias", "x.position_bias"):
        with pytest.raises(ConfigError, match="use another name"):
            request(name=name)
    assert bias_name("length_generalisation") == "position_bias" and bias_name("v1.2") == "v1.2.position_bias"
    assert request(name="yarn-8.0_b").name == "yarn-8.0_b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, r"--lengths = \(\): empty"),
        ({"lengths": (24, 0)}, "--lengths = 0: must be at least 1"),
        ({"lengths": (24, -24)}, "--lengths = -24: must be at least 1"),
        ({"lengths": (24, 24)}, "--lengths = 24,24: 24 is there twice"),
        ({"lengths": (1,)}, "--lengths = 1: must be at least 2"),
        ({"num_documents": 0}, "--num_documents = 0: must be at least 1"),
        ({"num_documents": -3}, "--num_documents = -3"),
        ({"window": 8}, "--window = 8, --stride = 0: give both"),
        ({"stride": 8}, "--window = 0, --stride = 8: give both"),
        ({"window": 8, "stride": 9}, "--window = 8, --stride = 9"),
        ({"window": 49, "stride": 9}, "<= 48, the longest length"),
        ({"task": "copy", "lengths": (24, 10**9)}, "--lengths = 1000000000: must be from 1 to 16,777,216"),
        ({"task": "mqar", "num_examples": 0}, "--num_examples = 0"),
        ({"task": "mqar", "pairs": (0,)}, "--pairs = 0"),
        ({"task": "passkey", "depths": (1.5,)}, "--depths = 1.5: must be from 0 to 1"),
        ({"task": "needle", "depths": (float("nan"),)}, "--depths = nan"),
        ({"task": "mqarr"}, "did you mean 'mqar'"),
        ({"task": "remembrance", "lengths": (1,)}, "--lengths = 1: must be at least 2"),
        ({"task": "remembrance", "num_documents": 1}, "--num_documents = 1: must be at least 2, as the tokens of one"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        request(**changes)


def test_flags_are_refused_before_anything_is_read_or_written(tmp_path):
    config = resolve_implementation(tiny_config("softmax_rope"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for flag in ("--num_documents=-1", "--lengths=0", "--name=../../x", "--window=-1", "--num_documents=", "--name="):
        with pytest.raises(ConfigError, match=flag.partition("=")[0]):
            eval_command.run([f"--workdir={tmp_path}", flag])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_remembrance_is_asked_by_its_own_flag_of_text(tmp_path):
    run = [f"--workdir={tmp_path}", "--remembrance"]

    def refused(message, *flags, settings=()):
        config = resolve_implementation(tiny_config("softmax_rope", *settings))
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        with pytest.raises(ConfigError, match=message):
            eval_command.run([*run, *flags])

    for flag in ("--task=mqar", "--window=8", "--stride=8", "--pairs=2", "--depths=0.5", "--num_examples=2"):
        refused(f"{flag.partition('=')[0]}: does not belong to --remembrance", flag)
    refused("--num_documents = 1: must be at least 2", "--num_documents=1")
    task = ("data.train=mqar", "data.heldout=mqar", "task.vocab_size=64", "task.num_pairs=2", "data.order=rectangle")
    refused("--remembrance: needs text; name a store with --data=STORE", settings=task)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_store_that_a_task_does_not_read_is_refused(tmp_path):
    config = resolve_implementation(tiny_config("softmax_rope"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(ConfigError, match="--data: does not belong to --task=mqar"):
        eval_command.run([f"--workdir={tmp_path}", "--task=mqar", "--data=books"])
    assert eval_command._request({"workdir": "a", "task": "needle", "data": "books"}, config).data == "books"


def test_whatever_a_number_depends_on_is_among_its_inputs(tmp_path):
    write_checkpoint(tmp_path, 7)
    write_checkpoint(tmp_path, 8)
    config = tiny_config("softmax_rope")

    def made_from(changes=(), config=config, step=7, data="sha256:a"):
        return inputs(request(workdir=str(tmp_path), **dict(changes)), config, step, data)

    first = made_from()
    scaled = override(config, {"position.scaling": "yarn", "position.factor": 8.0})
    others = [
        made_from({"lengths": (24,)}), made_from({"num_documents": 5}), made_from({"window": 8, "stride": 4}),
        made_from({"task": "mqar"}), made_from(config=scaled), made_from(step=8), made_from(data="sha256:b"),
        made_from(config=override(config, {"model.dtype": "bfloat16"})),
        made_from(config=override(config, {"evaluation.chunk_size": 7})),
    ]  # fmt: skip
    assert all(other != first for other in others)
    assert made_from({"name": "y", "lengths": (48, 24)}) == first  # neither names nor orders count
    remembered = made_from({"task": "remembrance"})
    assert remembered == made_from({"task": "remembrance", "lengths": (48,)}) != made_from({"lengths": (48,)})
    assert remembered != made_from({"task": "remembrance", "num_documents": 5})
    assert made_from(config=override(config, {"logging.every_steps": 3, "mesh.data": 1})) == first
    write_checkpoint(tmp_path, 7, parameters="b")
    assert made_from() != first


def test_arrays_of_another_evaluation_than_the_numbers_are_refused(tmp_path):
    path = write_result(tmp_path, "x", {"inputs": {"step": 1}}, {"sums": np.ones(1)})
    assert read_arrays(path, {"inputs": {"step": 1}})["sums"].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"x\.json and its \.npz are of different evaluations"):
        read_arrays(path, {"inputs": {"step": 2}})
