"""Evaluations of real, untrained models: reading in chunks through the state equals reading at once."""

import dataclasses

import jax
import numpy as np
import pytest

from sympow_jax import config as config_lib
from sympow_jax.evals.length_generalisation import length_generalisation
from sympow_jax.evals.retrieval import Matcher
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.models.model import Model, resolve_implementation
from tests.evals.toy import make_store

pytestmark = pytest.mark.quick
SHAPE = {
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 64,
    "scan_layers": True,
}


def tiny_model(variant):
    config = config_lib.parse_flags([f"--config=configs/quickstart.py:{variant}"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_std=0.2, **SHAPE))
    model = Model(resolve_implementation(config), 128)
    return model, model.init(jax.random.key(0))


@pytest.mark.slow
def test_streamed_losses_equal_one_call():
    model, params = tiny_model("conformal_sympow")
    assert model.streams_constant
    store = make_store(num_documents=2, length=256, vocab=100)
    options = dict(lengths=[64, 256], train_length=64, num_documents=2, batch_size=2)
    streamed, _ = length_generalisation(model, params, store, chunk_size=64, **options)
    once, _ = length_generalisation(model, params, store, chunk_size=256, **options)
    for key in ("lengths", "same_target"):
        for a, b in zip(streamed[key], once[key], strict=True):
            np.testing.assert_allclose(a["nll"], b["nll"], rtol=1e-5)
    np.testing.assert_allclose(streamed["contextwise"]["nll"], once["contextwise"]["nll"], rtol=1e-5)
    assert abs(once["lengths"][0]["nll"] - np.log(128)) > 0.01  # not just the uniform distribution


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax_rope", "conformal_sympow"])
def test_streamed_answers_equal_one_call(variant):
    model, params = tiny_model(variant)
    task = MQAR(64, num_pairs=4, vocab_size=128)
    batch = task.batch(0, 0, 16)
    everywhere = np.ones_like(batch["loss_mask"], bool)
    logits, _ = model.logits(params, batch["inputs"])
    targets = np.where(batch["inputs"] % 2 == 0, np.argmax(logits, axis=-1), 0).astype(np.int32)
    expected = targets == np.argmax(logits, axis=-1)
    streamed = Matcher(model, params, chunk_size=32).right(batch["inputs"], targets, everywhere)
    assert (streamed == expected).mean() > 0.995 and 0.2 < expected.mean() < 0.8
