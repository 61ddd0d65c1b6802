"""Tasks as training data: the interface of stores over examples that are made when they are read."""

import dataclasses

import numpy as np
import pytest

from sympow_jax.config import TASKS, ConfigError
from sympow_jax.input_pipeline.opening import open_batches
from sympow_jax.input_pipeline.tasks.copying import Copy, SelectiveCopy
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.input_pipeline.tasks.passkey import Passkey
from sympow_jax.input_pipeline.tasks.task_store import KINDS, make_task
from sympow_jax.input_pipeline.tokenizers import IdTokenizer, TokenizerError, load_tokenizer
from tests.models.small import tiny_config

FLAGS = ("data.train=mqar", "data.heldout=mqar", "task.vocab_size=90", "task.num_pairs=4", "task.word_repeats=4,1")
FLAGS += ("task.num_hops=1",)
SETTINGS = tiny_config("sympow", *FLAGS).task


def batches(spec="mqar", split="train", seq_len=32, batch_size=48, **options):
    return open_batches(spec, split, seq_len=seq_len, batch_size=batch_size, task=SETTINGS, **options)


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_pure_functions_of_seed_and_step(name):
    seq_len = 400 if KINDS[name].of_words else 32
    first, again, other = (batches(name, seq_len=seq_len, seed=seed)[7] for seed in (1, 1, 2))
    assert set(KINDS) == set(TASKS)
    for key, array in first.items():
        assert array.shape == (48, seq_len)
        np.testing.assert_array_equal(array, again[key])
    assert (first["inputs"] != other["inputs"]).any()
    assert first["loss_mask"].sum() > 0 and first["inputs"].dtype == np.int32
    heldout = batches(name, "heldout", seq_len=seq_len, seed=1)[7]
    assert (first["inputs"] != heldout["inputs"]).any()


def test_batches_do_not_depend_on_their_size_or_the_number_of_hosts():
    whole = batches(batch_size=96)[5]
    parts = [batches(batch_size=96, process_index=index, process_count=3)[5] for index in range(3)]
    halves = [batches(batch_size=48)[step] for step in (10, 11)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_heldout_examples_share_no_sequence_with_training():
    seen = {row.tobytes() for step in range(20) for row in batches(seed=0)[step]["inputs"]}
    heldout = {row.tobytes() for step in range(20) for row in batches(split="heldout", seed=0)[step]["inputs"]}
    assert len(seen) == len(heldout) == 20 * 48 and not seen & heldout


def test_settings_reach_the_task_that_they_belong_to():
    settings = dataclasses.replace(SETTINGS, num_passes=2, power=1.0, random_filler=False)
    assert make_task("mqar", 32, settings) == MQAR(32, 4, 90, 1.0, False, 2)
    assert make_task("copy", 32, settings) == Copy(32, 90)
    assert make_task("selective_copy", 32, settings) == SelectiveCopy(32, 4, 90)
    assert make_task("passkey", 400, settings) == Passkey(400)


def test_a_batch_is_described_by_its_ids():
    source = batches()
    described = source.describe(3)
    assert described[0]["documents"] == [3 * 48]
    tokenizer = source.stores[0].tokenizer
    np.testing.assert_array_equal(tokenizer.encode(described[5]["text"]), source[3]["inputs"][5])


def test_id_tokenizer_round_trip_and_refusal(tmp_path):
    tokenizer = IdTokenizer(90)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 90 and loaded.digest == tokenizer.digest
    assert loaded.decode(loaded.encode("3 17 89")) == "3 17 89"
    for text in ("3 x", "90"):
        with pytest.raises(TokenizerError, match=r"numbers of 0\.\.89"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("data.train=mqar",), "data.heldout = 'python-stdlib': must equal data.train = 'mqar'"),
        ((*FLAGS, "evaluation.contextwise_length=24"), "'mqar' has no loss by position"),
        ((*FLAGS, "task.num_pairs=0"), "task.num_pairs = 0: must be positive"),
    ],
)
def test_config_errors_are_one_line(flags, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("sympow", *flags)
