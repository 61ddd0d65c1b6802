"""--config=WORKDIR:VARIANT: what comes from the workdir, what from the row, and what is refused."""

import dataclasses
import json

import pytest

from sympow_jax.config import ConfigError, diff, initial_weights_flags, parse_flags
from sympow_jax.config.exchange import NEW_PARAMETERS
from tests.models.small import tiny_config


@pytest.fixture
def workdir(tmp_path):
    def make(variant="softmax_rope", *flags):
        config = tiny_config(variant, "data.seq_len=40", "optimizer.b2=0.9", "attention.bias=qkv", *flags)
        saved = dataclasses.asdict(config) | {"mesh": dataclasses.asdict(config.mesh) | {"cpu_devices": 2}}
        (tmp_path / "config.json").write_text(json.dumps(saved))
        return str(tmp_path), config

    return make


def parse(folder, variant="", *flags):
    return parse_flags([f"--config={folder}{variant and ':'}{variant}", *(f"--config.{flag}" for flag in flags)])


def test_all_but_the_row_is_the_workdirs(workdir):
    folder, old = workdir("softmax_rope", "attention.implementation=reference", "attention.chunk_size=8")
    changes = diff(old, parse(folder, "conformal_sympow", "data.batch_size=2"))
    new = {key: new for key, (_, new) in changes.items()}
    assert new == {
        "variant": "conformal_sympow",
        "attention.kernel": "power",
        "attention.position": "learned_rope",
        "attention.gate": "data",
        "attention.gate_init": "timescales",
        "attention.blend_from": "softmax_rope",
        "attention.implementation": "auto",
        "attention.chunk_size": 0,
        "data.batch_size": 2,
    }
    assert parse(folder, "fox").attention.gate_init == "zero"
    assert diff(old, parse(folder)).keys() == {"attention.implementation", "attention.chunk_size"}


def test_the_rotation_is_that_of_the_row(workdir):
    folder, _ = workdir("conformal_vector_sympow", "position.rotation_rank=5")
    assert parse(folder, "conformal_sympow").position.rotation == "scalar"
    found = parse(folder, "selective_rope").position
    assert (found.rotation, found.rotation_rank) == ("frequency", 5)


def test_a_pattern_of_layers_is_exchanged_as_a_whole_and_blends_with_nothing(workdir):
    folder, _ = workdir("softmax_rope", "attention.layer_pattern=window,attention")
    attention = parse(folder, "sympow").attention
    assert attention.layer_pattern == ("attention",) and attention.blend_from == "none"
    with pytest.raises(ConfigError, match=r"attention.blend_steps = 3: attention.blend_from = 'none'"):
        parse(folder, "sympow", "attention.blend_steps=3")


@pytest.mark.parametrize(
    ("variant", "flags", "words"),
    [
        ("sympw", (), "no variant 'sympw'; did you mean 'sympow'"),
        ("fox", ("attention.blend_steps=3",), "fades into kernel power, and the layers are softmax"),
        ("conformal_sympow", ("position.scaling=yarn", "position.factor=2"), "only rope is scaled"),
        ("rebased", ("attention.qk_norm=true",), "rebased normalises queries and keys itself"),
        ("sympow", ("optimizer.learning_rates=*gate*",), r"has '\*gate\*': write PATTERN=RATE"),
        ("sympow", ("optimizer.learning_rates=*gate*=0",), "positive rate"),
        ("", ("variant=sympow",), "has its layers already; write --config=WORKDIR:VARIANT"),
    ],
)
def test_what_does_not_go_together_is_one_line(workdir, variant, flags, words):
    folder, _ = workdir()
    with pytest.raises(ConfigError, match=words) as caught:
        parse(folder, variant, *flags)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json; name the workdir of a run"):
        parse(tmp_path, "sympow")


def test_what_only_the_variant_has_may_start_anew_if_the_config_is_a_workdirs(workdir):
    folder, _ = workdir()
    given = {"init_from": "W", "init_from_allow": "embedding/*"}
    assert initial_weights_flags(given, [f"--config={folder}:fox"]) == ("W", ",".join([*NEW_PARAMETERS, "embedding/*"]))
    assert initial_weights_flags(given, ["--config=quickstart:fox"]) == ("W", "embedding/*")
    assert initial_weights_flags({}, [f"--config={folder}:fox"]) == ("", "")
    with pytest.raises(ConfigError, match=r"--init_from_allow = 'embedding/\*': there is no --init_from, whose"):
        initial_weights_flags({"init_from_allow": "embedding/*"}, ["--config=quickstart:fox"])
