"""Each generator against the definition of its task: what is asked for, worked out anew, and how it is distributed."""

import itertools
import re

import numpy as np
import pytest

from sympow_jax.input_pipeline.tasks.memory import POP, ForgettingRecall, StackRecall
from sympow_jax.input_pipeline.tasks.ruler import CommonWords, FrequentWords, MultiKey, VariableTracking
from sympow_jax.input_pipeline.tasks.state_tracking import WordProblem, product_table
from sympow_jax.input_pipeline.tasks.synthetic import TooShortError, draw_distinct, row_stream, uniform
from sympow_jax.input_pipeline.tasks.words import NUM_MARKS
from sympow_jax.input_pipeline.tokenizers import load_tokenizer
from tests.input_pipeline.shares import shares_are_uniform

IDS = {"tokenizer": "ids", "id_vocab": 60}


def examples(task, count=200, seed=0):
    batch = task.batch(seed, 0, count)
    return zip(batch["inputs"].tolist(), batch["targets"].tolist(), batch["loss_mask"] > 0, strict=True)


def test_rows_draw_their_own_uniform_numbers():
    draw, other = row_stream(1, 2, 0), row_stream(1, 2, 1)
    numbers = np.stack([draw(20_000), other(20_000)])
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.03 and abs(numbers.mean() - 0.5) < 0.005
    assert not np.isin(uniform(1, 2, (1000,)), numbers).any()  # nor those of tasks that draw a batch at once


def test_distinct_draws_are_orders_of_equal_probability():
    orders = list(itertools.permutations(range(4), 3))
    found = [orders.index(tuple(draw_distinct(row, 4))) for row in uniform(0, 0, (6_000, 3))]
    shares_are_uniform(found, 0, 24)


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("Z5", 5), ("S5", 120)])
def test_word_problems_ask_for_the_running_product(group, order):
    table, everything = product_table(group), np.arange(order)
    assert table.shape == (order, order) and (table[0] == everything).all() and (table[:, 0] == everything).all()
    assert all((np.sort(line) == everything).all() for line in (*table, *table.T))
    a, b, c = (uniform(0, 1, (3, 300)) * order).astype(int)
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == (group != "S5")
    for inputs, targets, asked in examples(WordProblem(12, group), 50):
        state = inputs[0]
        for t in range(12):
            state = table[state, inputs[t]] if t else state
            assert targets[t] == state and asked[t]
    batch = WordProblem(12, group).batch(0, 0, 2_000)
    shares_are_uniform(batch["inputs"], 0, order)
    shares_are_uniform(batch["targets"][:, -1], 0, order)


def test_permutations_act_one_after_the_other():
    """A transposition, then a cycle: the product of S5's table is composition, a after b."""
    elements = list(itertools.permutations(range(5)))
    a, b = (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)
    assert elements[product_table("S5")[elements.index(a), elements.index(b)]] == (0, 2, 3, 4, 1)


def test_a_stack_gives_back_the_last_that_is_there():
    task, depths = StackRecall(64, max_depth=3, vocab_size=12), []
    for inputs, targets, asked in examples(task):
        stack = []
        for token, target, is_asked in zip(inputs, targets, asked, strict=True):
            assert is_asked == (token == POP)
            if is_asked:
                assert target == stack.pop()
            else:
                stack.append(token)
                assert token >= 2 and target == 0
            assert len(stack) <= 3
            depths.append(len(stack))
    # The walk of the depth, reflected at 0 and 3: stationary weights 1, 2, 2, 1
    np.testing.assert_allclose(np.bincount(depths) / len(depths), np.array([1, 2, 2, 1]) / 6, atol=0.02)
    batch = task.batch(0, 0, 500)
    shares_are_uniform(batch["targets"][batch["loss_mask"] > 0], 2, 10)


def test_overwritten_values_are_forgotten():
    distances = []
    for inputs, targets, asked in examples(ForgettingRecall(96, num_keys=4, vocab_size=24)):
        held, when = {}, {}
        assert not asked[1::2].any() and len(set(inputs[::2])) <= 4
        for i, (key, value) in enumerate(zip(inputs[::2], inputs[1::2], strict=True)):
            assert 1 <= key < 12 <= value < 24
            assert asked[2 * i] == (key in held) and targets[2 * i] == held.get(key, 0)
            distances += [i - when[key]] if key in held and i > 24 else []
            held[key], when[key] = value, i
    np.testing.assert_allclose(np.mean(distances), 4, atol=0.15)  # geometric, in pairs; all from i > 24 on
    batch = ForgettingRecall(96, num_keys=4, vocab_size=24).batch(0, 0, 300)
    shares_are_uniform(batch["targets"][batch["loss_mask"] > 0], 12, 12)
    shares_are_uniform(batch["inputs"][:, 2], 1, 11)


def text_of(task, count=20):
    decode = load_tokenizer("byte").decode
    for inputs, targets, asked in examples(task, count):
        assert inputs[0] == 256 and inputs[1:] == targets[:-1]
        yield decode(targets[: -asked.sum()]), decode(np.array(targets)[asked]).split(), int(asked.sum())


def test_variables_are_tracked_through_their_chain():
    firsts = []
    for text, answer, length in text_of(VariableTracking(seq_len=600, num_chains=3, num_hops=2), 60):
        told, question = text.split("\nThe variables with the value ")
        held, order = {}, []
        for statement in told.split("\nVAR ")[1:]:
            name, source = statement.split(".")[0].split(" = ")
            chained = source.startswith("VAR ")
            held[name] = held[source.removeprefix("VAR ")] if chained else source
            assert not chained or source.split()[1] == [other for other in order if held[other] == held[name]][-1]
            order.append(name)
        value = question.split()[0]
        assert [name for name in order if held[name] == value] == answer and length == 7 * 3
        assert len(held) == 9
        assert all(list(held.values()).count(v) == 3 for v in held.values())
        firsts.append(order.index(answer[0]))
    assert set(firsts) >= {0, 1, 2}  # the chain that is asked for begins anywhere


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_that_is_asked_for_lies_at_its_depth(depth):
    for text, answer, length in text_of(MultiKey(seq_len=500, num_keys=4, depth=depth)):
        told, key = text[: text.rindex("\n")], text[text.rindex("\n") :].split()[-2]
        pairs = [line.split(".")[0].split(" is ") for line in told.split("\nThe secret word of ")[1:]]
        assert len(pairs) == 4 and length == 7 and [dict(pairs)[key]] == answer
        place = [name for name, _ in pairs].index(key)
        assert {0.0: place == 0, 0.5: True, 1.0: place == 3}[depth]
    depths = [text.index(f"of {text.split()[-2]} is") / 470 for text, _, _ in text_of(MultiKey(seq_len=500), 60)]
    assert 0.35 < np.mean(depths) < 0.65 and min(depths) < 0.15 and max(depths) > 0.85


@pytest.mark.parametrize("options", [{}, IDS], ids=["bytes", "ids"])
def test_common_words_stand_as_often_as_they_should(options):
    task = CommonWords(seq_len=400, num_common=4, repeats=(6, 2), **options)
    for _, targets, asked in examples(task, 20):
        mark = NUM_MARKS + 1
        if options:
            answer, listed = np.array(targets)[asked].tolist(), [token for token in targets[:-5] if token >= mark]
        else:
            answer = task.words.tokenizer.decode(np.array(targets)[asked]).split()
            text = task.words.tokenizer.decode(targets).split("\nThe most")[0]
            listed = re.findall(r"\b(?:[bdfgklmnprstvz][aeiou]){3}\b", text)
        counts = {word: listed.count(word) for word in dict.fromkeys(listed)}
        assert [word for word in counts if counts[word] == 6] == answer and len(answer) == 4
        assert {counts[word] for word in counts if word not in answer} == {2}
        assert len(counts) > 12


def test_frequent_words_follow_the_zeta_distribution():
    task = FrequentWords(seq_len=500, **IDS)
    for _, targets, asked in examples(task, 20):
        answer = np.array(targets)[asked].tolist()
        listed = [token for token in targets[:-3] if token > NUM_MARKS]
        words, counts = np.unique(listed, return_counts=True)
        order = np.argsort(-counts)
        assert words[order][:3].tolist() == answer and len(listed) > 400
        shares = counts[order] / len(listed)
        expected = np.arange(1, len(shares) + 1) ** -2.0
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)
    *_, (_, answer, _) = text_of(FrequentWords(seq_len=500), 2)
    assert len(set(answer)) == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WordProblem(8, "Z1"), ValueError, "group 'Z1': must be S5, or ZN"),
        (lambda: WordProblem(8, "Z4097"), ValueError, "with a modulus N from 2 to 4,096"),
        (lambda: StackRecall(8, max_depth=0), ValueError, "max_depth 0: must be at least 1"),
        (lambda: ForgettingRecall(8, num_keys=9, vocab_size=16), ValueError, "must hold 9 distinct keys"),
        (lambda: MultiKey(seq_len=9, num_keys=2, **IDS), TooShortError, "seq_len 9: too short .* add 5 tokens"),
        (lambda: MultiKey(seq_len=500, num_keys=30, **IDS), ValueError, "vocab_size 60: has 51 words, and 60 are"),
        (lambda: CommonWords(seq_len=900, repeats=(3, 3)), ValueError, "word_repeats .3, 3.: must be two numbers"),
        (lambda: CommonWords(seq_len=900), TooShortError, "add 13.. tokens, or lower num_pairs or word_repeats"),
        (lambda: FrequentWords(seq_len=12, **IDS), TooShortError, "the first 3 ranks must differ"),
        (lambda: MultiKey(seq_len=50, tokenizer="ids", id_vocab=10), ValueError, "vocab_size 10: must be at least 11"),
    ],
)
def test_errors_name_the_field(make, error, message):
    with pytest.raises(error, match=message):
        make()
