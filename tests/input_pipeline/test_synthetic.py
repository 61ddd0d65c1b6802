import numpy as np
import pytest

from sympow_jax.input_pipeline.tasks import synthetic
from sympow_jax.input_pipeline.tasks.copying import BLANK, MARKER, Copy, SelectiveCopy
from sympow_jax.input_pipeline.tasks.memory import ForgettingRecall, StackRecall
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.input_pipeline.tasks.passkey import Needle, Passkey
from sympow_jax.input_pipeline.tasks.ruler import CommonWords, FrequentWords, MultiKey, VariableTracking
from sympow_jax.input_pipeline.tasks.state_tracking import WordProblem
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from tests.evals.toy import ArrayStore
from tests.input_pipeline.shares import shares_are_uniform

TASKS = [
    MQAR(64, num_pairs=8, vocab_size=512),
    MQAR(64, num_pairs=8, vocab_size=512, random_filler=False),
    Copy(32),
    SelectiveCopy(48, num_content=8),
    Passkey(400),
    WordProblem(16, "S5"),
    StackRecall(32, 4),
    ForgettingRecall(32, 4),
    VariableTracking(seq_len=60, num_chains=2, num_hops=2, tokenizer="ids", id_vocab=60),
    MultiKey(seq_len=400),
    CommonWords(seq_len=400, num_common=3, repeats=(5, 1)),
    FrequentWords(seq_len=60, tokenizer="ids", id_vocab=60),
]


def byte_store(num_documents=4, length=500):
    tokenizer = load_tokenizer("byte")
    tokens = np.random.default_rng(0).integers(97, 123, (num_documents, length)).astype(np.uint16)
    return ArrayStore(tokens, np.arange(num_documents), bos_id=tokenizer.bos_id, tokenizer=tokenizer)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_batches_are_pure_functions_of_seed_and_step(task):
    first, again, more = task.batch(3, 5, 4), task.batch(3, 5, 4), task.batch(3, 5, 6)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array, more[name][:4])  # a row does not depend on how many there are
        assert array.shape == (4, task.seq_len)
        assert array.dtype == (np.float32 if name == "loss_mask" else np.int32)
    assert (first["inputs"] != task.batch(3, 6, 4)["inputs"]).any()
    assert (first["inputs"] != task.batch(4, 5, 4)["inputs"]).any()
    assert first["inputs"].min() >= 0 and max(first[name].max() for name in ("inputs", "targets")) < task.vocab_size
    assert len({row.tobytes() for row in first["inputs"]}) == 4
    assert {1.0} <= {*first["loss_mask"].flat} <= {0.0, 1.0}


def test_uniform_is_pinned():
    """These numbers are part of every published synthetic run: they may never change."""
    expected = [0.3093149112, 0.3569562368, 0.0369045305]
    np.testing.assert_allclose(synthetic.uniform(1, 2, (3,)), expected, atol=1e-10)
    many = synthetic.uniform(0, 0, (100_000,))
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.std() - 12**-0.5) < 0.005


@pytest.mark.parametrize("random_filler", [True, False])
def test_mqar_examples_follow_their_definition(random_filler):
    task = MQAR(64, num_pairs=6, vocab_size=300, random_filler=random_filler)
    batch = task.batch(0, 0, 200)
    for inputs, targets, mask in zip(batch["inputs"], batch["targets"], batch["loss_mask"], strict=True):
        keys, values = inputs[0:12:2], inputs[1:12:2]
        assert len(set(keys)) == len(set(values)) == 6
        assert keys.min() >= 1 and keys.max() < 150 and values.min() >= 150
        queries = np.flatnonzero(mask)
        assert len(queries) == 6 and queries.min() >= 12 and (queries % 2 == 0).all()
        assert dict(zip(inputs[queries], targets[queries], strict=True)) == dict(zip(keys, values, strict=True))
        others = np.delete(inputs[12:], queries - 12)
        assert (others == 0).all() if not random_filler else len(set(others)) > 20
        assert (targets[mask == 0] == 0).all()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_mqar_slots_have_the_distribution_of_sequential_draws(power):
    """Against numpy's own draws without replacement with probabilities (r + 1)^(power - 1)."""
    n, slots, examples = 4, 28, 4000
    batch = MQAR(64, num_pairs=n, vocab_size=128, power=power, random_filler=False).batch(0, 0, examples)
    keys, rest = batch["inputs"][:, 0 : 2 * n : 2], batch["inputs"][:, 2 * n :: 2]
    ours = np.argmax(rest[:, None, :] == keys[:, :, None], axis=2)  # the slot of each pair
    p = np.arange(1, slots + 1) ** (power - 1.0)
    rng = np.random.default_rng(0)
    theirs = np.stack([rng.choice(slots, n, replace=False, p=p / p.sum()) for _ in range(examples)])
    for pair in range(n):
        np.testing.assert_allclose(
            np.bincount(ours[:, pair], minlength=slots) / examples,
            np.bincount(theirs[:, pair], minlength=slots) / examples,
            atol=0.035,
        )
        np.testing.assert_allclose(ours[:, pair].mean(), theirs[:, pair].mean(), atol=0.6)
    first = (ours[:, 0] == 0).mean()
    np.testing.assert_allclose(first, 0.25 if power == 0.01 else 1 / slots, atol=0.02)


def test_mqar_keys_values_and_filler_are_uniform():
    inputs = MQAR(64, num_pairs=4, vocab_size=66).batch(0, 0, 8000)["inputs"]
    for column, low, high in ((0, 1, 33), (6, 1, 33), (1, 33, 66), (63, 0, 66)):
        shares_are_uniform(inputs[:, column], low, high - low)


def test_mqar_passes_repeat_the_pairs_before_the_queries():
    """Zoology's num_passes: the same pairs in the same order, and every key still asked for once, after all passes."""
    batch = MQAR(64, num_pairs=5, vocab_size=128, num_passes=3, random_filler=False).batch(0, 0, 50)
    inputs, asked = batch["inputs"], batch["loss_mask"] > 0
    for start in (10, 20):
        np.testing.assert_array_equal(inputs[:, start : start + 10], inputs[:, :10])
    assert (asked.sum(axis=1) == 5).all() and not asked[:, :30].any()
    for row in range(50):
        assert set(inputs[row][asked[row]]) == set(inputs[row, :10:2])
        assert set(batch["targets"][row][asked[row]]) == set(inputs[row, 1:10:2])
    np.testing.assert_array_equal(
        MQAR(64, num_pairs=5, num_passes=1, vocab_size=128).batch(0, 0, 9)["inputs"],
        MQAR(64, num_pairs=5, vocab_size=128).batch(0, 0, 9)["inputs"],
    )


def test_mqar_gaps_have_the_moments_of_the_power_law():
    """Mean and variance of the slot of a lone query, against those of p_r = (r + 1)^(a - 1)."""
    slots, examples = 31, 20_000
    batch = MQAR(64, num_pairs=1, vocab_size=128, random_filler=False).batch(1, 0, examples)
    slot = (np.argmax(batch["loss_mask"], axis=1) - 2) // 2
    p = np.arange(1, slots + 1) ** (0.01 - 1.0)
    p /= p.sum()
    mean = (p * np.arange(slots)).sum()
    variance = (p * (np.arange(slots) - mean) ** 2).sum()
    np.testing.assert_allclose(slot.mean(), mean, atol=4 * np.sqrt(variance / examples))
    np.testing.assert_allclose(slot.var(), variance, rtol=0.05)


def test_mqar_full_grid_uses_every_slot():
    """With n = T / 4 pairs every slot holds a query."""
    batch = MQAR(64, num_pairs=16, vocab_size=128).batch(0, 0, 8)
    np.testing.assert_array_equal(batch["loss_mask"][:, 32::2], 1.0)


def test_copy_repeats_after_the_marker():
    batch = Copy(12).batch(0, 0, 5)
    tokens = np.concatenate([batch["inputs"][:, :1], batch["targets"]], axis=1)
    np.testing.assert_array_equal(tokens[:, :6], tokens[:, 7:])
    assert (tokens[:, 6] == MARKER).all() and (tokens[:, :6] > MARKER).all()
    np.testing.assert_array_equal(batch["loss_mask"], np.tile(np.arange(12) >= 6, (5, 1)))


def test_selective_copy_asks_for_the_content_in_order():
    batch = SelectiveCopy(40, num_content=5).batch(0, 0, 50)
    for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
        assert (inputs[35:] == MARKER).all()
        np.testing.assert_array_equal(inputs[:35][inputs[:35] != BLANK], targets[35:])
    places = (batch["inputs"][:, :35] != BLANK).mean(axis=0)
    assert places.min() > 0 and places.max() < 0.4


def text_of(batch, row):
    return load_tokenizer("byte").decode(batch["targets"][row])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_hides_the_answer_at_its_depth(depth):
    task = Passkey(600, depth=depth)
    batch = task.batch(0, 0, 3)
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (batch["inputs"][:, 0] == task.vocab_size - 1).all()
    for row in range(3):
        text = text_of(batch, row)
        key = text[-5:]
        assert text.endswith(f"The pass key is {key}") and text.count(key) == 3
        asked = load_tokenizer("byte").decode(batch["targets"][row][batch["loss_mask"][row] > 0])
        assert asked == f" {key}"
        before, after = (
            text.index("\nThe pass key is") - 143,
            text.index("\nWhat is") - text.index("is the pass key.") - 17,
        )
        assert abs(before / (before + after) - depth) < 0.02


def test_passkey_and_needle_under_gpt2s_vocabulary(gpt2_folder):
    """Exactly seq_len tokens, only the answer's asked for, ids up to end of text as BOS."""
    tokenizer = load_tokenizer(f"gpt2-json:{gpt2_folder}")
    tokens = np.tile(tokenizer.encode("def f():\n    return 1\n"), 40)[None, :500].astype(np.uint16)
    store = ArrayStore(tokens, np.arange(1), bos_id=tokenizer.bos_id, tokenizer=tokenizer)
    for task in (Passkey(500, tokenizer=f"gpt2-json:{gpt2_folder}", depth=0.5), Needle(300, store, depth=0.5)):
        batch = task.batch(0, 0, 2)
        assert batch["targets"].shape == (2, task.seq_len) and task.vocab_size == 50257
        assert (batch["inputs"][:, 0] == 50256).all()
        text = tokenizer.decode(batch["targets"][0])
        asked = tokenizer.decode(batch["targets"][0][batch["loss_mask"][0] > 0])
        assert asked.startswith(" ") and len(asked) == 6 and text.endswith(asked) and asked + "." in text[:-10]


def test_needle_hides_a_sentence_in_real_documents():
    store = byte_store()
    batch = Needle(300, store, depth=0.5).batch(0, 0, 4)
    for row in range(4):
        text = text_of(batch, row)
        key, question = text[-5:], text[text.rindex("\n") : -6]
        assert f"{question} {key}.\n" in text[:-50]
        start = text[:50].encode()
        assert any(bytes(document[:50].astype(np.uint8)) == start for document in store.tokens)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MQAR(32, num_pairs=9, vocab_size=99), "seq_len 32, num_pairs 9"),
        (lambda: MQAR(32, num_pairs=6, num_passes=2, vocab_size=99), "at least 36, 2 num_pairs .num_passes . 1."),
        (lambda: MQAR(32, num_pairs=4, vocab_size=32), "vocab_size 32: must exceed seq_len 32"),
        (lambda: Copy(32, vocab_size=3), "vocab_size 3: must be at least 4"),
        (lambda: Passkey(100), "too short for the text around the fact"),
        (lambda: Needle(501, byte_store()).batch(0, 0, 1), "exceeds the 500 tokens"),
    ],
)
def test_errors_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()
