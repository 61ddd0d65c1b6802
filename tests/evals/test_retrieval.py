import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import parse_flags
from sympow_jax.evals import retrieval
from sympow_jax.evals.retrieval import Matcher, task_grid
from sympow_jax.input_pipeline.tasks.memory import StackRecall
from sympow_jax.input_pipeline.tasks.mqar import MQAR
from sympow_jax.input_pipeline.tasks.ruler import MultiKey
from sympow_jax.input_pipeline.tasks.synthetic import TooShortError
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from sympow_jax.plots import style
from sympow_jax.plots.heatmap import accuracy_heatmap
from tests.evals.toy import ArrayStore


def settings_of(vocab_size, **changes):
    """Of tasks, for a model with this vocabulary."""
    settings = parse_flags(["--config=configs/default.py"]).task
    return dataclasses.replace(settings, vocab_size=vocab_size, **changes)


@dataclasses.dataclass(frozen=True)
class Recaller:
    """Answers with the token that followed the last occurrence of the current token, among the last `memory` pairs.

    Its state is the last `memory` tokens: it solves MQAR exactly while the pairs fit.
    """

    vocab_size: int
    memory: int = 1 << 20
    depends_on_length: bool = False
    streams: bool = True
    mesh: None = None

    def initial_state(self, batch_size, max_length):
        return jnp.full((batch_size, min(self.memory, max_length)), -1, jnp.int32)

    def logits(self, params, inputs, *, state=None, length=0):
        past = self.initial_state(*inputs.shape) if state is None else state
        tokens = jnp.concatenate([past, inputs], axis=1)
        width, (_, length) = past.shape[1], inputs.shape

        def answer(t):
            window = jax.lax.dynamic_slice_in_dim(tokens, t, width + 1, axis=1)
            match = window[:, :-1] == window[:, -1:]
            last = width - 1 - jnp.argmax(match[:, ::-1], axis=1)
            following = jnp.take_along_axis(window, last[:, None] + 1, axis=1)[:, 0]
            return jnp.where(match.any(axis=1), following, 0)

        guess = jax.vmap(answer, out_axes=1)(jnp.arange(length))
        return jax.nn.one_hot(guess, self.vocab_size), tokens[:, -width:]


def test_mqar_grid_scores_a_model_that_remembers():
    matcher = Matcher(Recaller(128), {}, chunk_size=64)
    settings = settings_of(128, random_filler=False)
    result, arrays = task_grid(
        matcher, "mqar", settings, lengths=[32, 64], pairs=[4, 16], num_examples=20, train_length=32
    )
    assert arrays["asked"].shape == (2, 2, 20) and arrays["asked"][1].max(axis=1).tolist() == [0, 16]
    assert result["accuracy"][0] == [1.0, 1.0] and result["solved"][0] == [1.0, 1.0]
    assert result["accuracy"][1] == [None, 1.0]  # 16 pairs do not fit in 32 tokens
    style.svg(accuracy_heatmap(result, title="MQAR"))


def test_examples_that_ask_for_nothing_are_not_solved():
    result = retrieval._summary(np.array([2, 1, 0]), np.array([2, 2, 0]), 0)
    assert result["accuracy"] == 0.75 and result["solved"] == 0.5


def test_mqar_accuracy_is_the_fraction_of_answers():
    """A memory of 24 tokens reaches some pairs only: the accuracy equals a count by hand."""
    task = MQAR(64, num_pairs=8, vocab_size=128, random_filler=False)
    matcher = Matcher(Recaller(128, memory=24), {}, chunk_size=64)
    right, asked = matcher.counts(task, num_examples=10)
    batch = task.batch(1 << 40, 0, 10)
    expected = [
        sum(q - 2 * np.flatnonzero(row[:16:2] == row[q])[0] <= 24 for q in np.flatnonzero(mask))
        for row, mask in zip(batch["inputs"], batch["loss_mask"], strict=True)
    ]
    np.testing.assert_array_equal(right, expected)
    assert (asked == 8).all() and 0 < right.sum() < 80


@pytest.mark.parametrize("chunk_size", [7, 32])
def test_streaming_in_chunks_changes_nothing(chunk_size):
    task = MQAR(64, num_pairs=8, vocab_size=128, random_filler=False)
    model = Recaller(128, memory=24)
    one, _ = Matcher(model, {}, chunk_size=64).counts(task, num_examples=10)
    streamed, _ = Matcher(model, {}, chunk_size=chunk_size).counts(task, num_examples=10)
    np.testing.assert_array_equal(one, streamed)


def test_a_model_that_reads_no_stream_reads_each_example_whole():
    class Whole(Recaller):
        def initial_state(self, batch_size, max_length):
            raise AssertionError("it has no state")

        def logits(self, params, inputs, *, state=None, length=0):
            return super().logits(params, inputs, state=Recaller.initial_state(self, *inputs.shape), length=length)

    task = MQAR(64, num_pairs=8, vocab_size=128, random_filler=False)
    right, asked = Matcher(Whole(128, streams=False), {}, chunk_size=32).counts(task, num_examples=4)
    assert right.sum() == asked.sum() == 32


@dataclasses.dataclass(frozen=True)
class Always:
    """Always the same token."""

    token: int
    vocab_size: int
    depends_on_length: bool = False
    streams: bool = True
    mesh: None = None

    def initial_state(self, batch_size, max_length):
        return jnp.zeros(())

    def logits(self, params, inputs, *, state=None, length=0):
        return jnp.broadcast_to(jax.nn.one_hot(self.token, self.vocab_size), (*inputs.shape, self.vocab_size)), state


def test_depth_grids_for_passkey_and_needle():
    """The first answer token is a space for every key: one of the six byte tokens is always right, none is solved."""
    tokenizer = load_tokenizer("byte")
    matcher = Matcher(Always(ord(" "), 257), {}, chunk_size=256)
    tokens = np.full((3, 512), ord("x"), np.uint16)
    store = ArrayStore(tokens, np.arange(3), bos_id=tokenizer.bos_id, tokenizer=tokenizer)
    for task, haystack in (("passkey", None), ("needle", store)):
        options = {"depths": [0.0, 1.0], "haystack": haystack, "num_examples": 3}
        result, _ = task_grid(matcher, task, settings_of(257), lengths=[400, 512], **options)
        np.testing.assert_allclose(result["accuracy"], 1 / 6)
        assert result["solved"] == [[0.0, 0.0], [0.0, 0.0]]
    style.svg(accuracy_heatmap(result))


def test_copy_grids():
    matcher = Matcher(Always(2, 4), {}, chunk_size=64)
    options = {"lengths": [16, 64], "num_examples": 50}
    plain, _ = task_grid(matcher, "copy", settings_of(4), **options)
    selective, _ = task_grid(matcher, "selective_copy", settings_of(4), pairs=[4, 16], **options)
    np.testing.assert_allclose(plain["accuracy"], 0.5, atol=0.12)  # two content tokens, one of them always said
    assert selective["accuracy"][1][0] is None
    style.svg(accuracy_heatmap(plain))
    style.svg(accuracy_heatmap(selective))


def test_rows_of_a_grid_reach_the_task(monkeypatch):
    def counts(self, task, *, num_examples, seed):
        made.append(task)
        return np.ones(num_examples, int), np.ones(num_examples, int)

    monkeypatch.setattr(Matcher, "counts", counts)
    made, settings, matcher = [], settings_of(64, num_pairs=3), Matcher(Always(2, 64), {})
    task_grid(matcher, "multi_key", settings, lengths=[400, 500], depths=[0.25, 1.0], num_examples=2)
    assert made == [MultiKey(seq_len=n, id_vocab=64, num_keys=3, depth=d) for d in (0.25, 1.0) for n in (400, 500)]
    made.clear()
    task_grid(matcher, "stack_recall", settings, lengths=[8], pairs=[2, 5], num_examples=2)
    assert made == [StackRecall(8, depth, 64) for depth in (2, 5)]


def test_tasks_of_the_table_are_asked_at_their_rows_and_within_the_vocabulary():
    """A model that always says one token is right as often as it is the answer; what it cannot say is refused."""
    matcher, settings = Matcher(Always(11, 64), {}, chunk_size=32), settings_of(64, tokenizer="ids", num_pairs=2)
    options = {"lengths": [16, 48], "num_examples": 60}
    for task, rows, chance in (
        ("parity", {}, 0),
        ("forgetting_recall", {"pairs": [2, 4]}, 0),
        ("stack_recall", {"pairs": [2, 4]}, 1 / 62),
        ("multi_key", {"depths": [0.0, 1.0]}, 1 / 55),
        ("variable_tracking", {"pairs": [1, 4]}, 1 / 55),
        ("frequent_words", {}, 1 / 55),
    ):
        result, _ = task_grid(matcher, task, settings, **rows, **options)
        assert result["rows"]["values"] == [*rows.values(), ["all"]][0]
        np.testing.assert_allclose(result["accuracy"][0][1], chance, atol=0.03)
        assert (result["accuracy"][-1][0] is None) == (task == "variable_tracking")  # four chains in 16 tokens
    with pytest.raises(TooShortError, match="seq_len 48: too short for this CommonWords"):
        task_grid(matcher, "common_words", settings, pairs=[2], **options)
    with pytest.raises(ValueError, match="vocab_size 64: of the model, is less than the 120 of the task"):
        task_grid(matcher, "s5", settings, **options)
