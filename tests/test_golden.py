"""Resolved configs and first steps of training are those recorded in golden/; `make golden` renews them."""

import json

import numpy as np
import pytest

from sympow_jax.config import flatten
from tests.checkpoints import make as kept
from tests.golden import make

CONFIGS = json.loads(make.CONFIGS.read_text())


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(kept.ROOT)  # configs and data are named relative to it


def test_every_config_is_recorded_and_defaults_are_as_recorded():
    assert sorted(CONFIGS) == sorted(make.config_files())
    assert json.loads(json.dumps(flatten(make.resolved(make.DEFAULT)))) == CONFIGS[make.DEFAULT]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != make.DEFAULT])
def test_a_config_resolves_to_what_is_recorded(name):
    assert make.differences(name) == CONFIGS[name]


@pytest.mark.parametrize(
    "variant",
    [
        v if v == "conformal_sympow" else pytest.param(v, marks=[pytest.mark.slow, pytest.mark.quick])
        for v in kept.VARIANTS
    ],
)
def test_the_first_steps_of_training_give_what_is_recorded(variant):
    """To the bit on the platform of the recording, else within 1e-5."""
    recorded = json.loads(make.METRICS.read_text())
    exact = recorded["platform"] == kept.this_platform()
    found = make.metrics(variant)
    for row, expected in zip(found, recorded["metrics"][variant], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=0 if exact else 1e-5, atol=0, err_msg=name)
    losses = [row["loss"] for row in found]
    assert losses[0] != losses[-1] and abs(losses[0] - np.log(32)) < 0.5
