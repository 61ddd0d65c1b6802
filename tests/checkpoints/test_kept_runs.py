"""Runs made by an earlier state of the code evaluate and continue as they did then, to the bit where it can be."""

import json

import numpy as np
import pytest

from sympow_jax.training.run_files import load_config
from tests.checkpoints import make


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make.unpack(folder)
    return folder


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(make.ROOT)  # the runs name their data relative to it


SAME_PLATFORM = json.loads(make.PLATFORM.read_text()) == make.this_platform()


def assert_as_recorded(actual, expected, *, rtol, name):
    if SAME_PLATFORM or not np.issubdtype(np.asarray(expected).dtype, np.floating):
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    else:
        np.testing.assert_allclose(actual, expected, rtol=rtol, err_msg=name)


SOON = ("conformal_sympow",)  # the others are in the slow suite


@pytest.mark.parametrize(
    "variant", [v if v in SOON else pytest.param(v, marks=[pytest.mark.slow, pytest.mark.quick]) for v in make.VARIANTS]
)
def test_kept_run_evaluates_to_the_same_bits(variant, runs):
    arrays = make.evaluate(runs / variant)
    with np.load(make.EVALUATION) as recorded:
        expected = {key.partition("/")[2]: recorded[key] for key in recorded.files if key.startswith(f"{variant}/")}
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        assert_as_recorded(arrays[name], values, rtol=1e-6, name=name)
    assert abs(np.sum(arrays["length_sums"]) / np.sum(arrays["length_counts"]) - np.log(32)) < 0.2  # no nan


@pytest.mark.parametrize("variant", make.VARIANTS)
def test_config_of_a_kept_run_loads(variant, runs):
    config = load_config(str(runs / variant))
    assert (config.variant, config.model.embed_dim, config.num_train_steps) == (variant, 8, make.STEPS)
    assert config.attention.implementation == ("blockwise" if config.attention.kernel == "softmax" else "chunked")


@pytest.mark.slow
@pytest.mark.parametrize("variant", make.VARIANTS)
def test_kept_run_continues_with_the_same_bits(variant, runs):
    rows = make.train(variant, runs / variant, make.STEPS + make.MORE_STEPS)[make.STEPS :]
    for row, expected in zip(rows, json.loads(make.CONTINUED.read_text())[variant], strict=True):
        for name, value in expected.items():
            assert_as_recorded(row[name], value, rtol=1e-5, name=name)
