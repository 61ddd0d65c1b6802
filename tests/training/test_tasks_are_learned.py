"""A tiny model learns each task far beyond chance; before training it is not above chance.

Chance is what one answer to everything gets, and is checked from both sides; a model without training is checked from
above alone, since it may say what is no answer at all.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sympow_jax.evals.retrieval import Matcher
from sympow_jax.input_pipeline.tasks.task_store import KINDS, make_task
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from tests.input_pipeline.shares import shares_are_uniform
from tests.models.small import ROOT, parse_flags

LENGTH = 24  # shorter examples are padded, so that one program trains every task


@functools.cache
def trainer(of_s5: bool):
    flags = ("task.tokenizer=ids", "task.vocab_size=20", "task.modulus=3", "task.num_hops=1", "task.word_repeats=6,2")
    flags += ("num_train_steps=400", "optimizer.warmup_steps=20", "task.num_pairs=2")
    flags += (f"data.seq_len={LENGTH}", f"evaluation.lengths={LENGTH}", "mesh.data=1")
    flags += ("model.mlp=gelu", "model.mlp_dim=256", "optimizer.learning_rate=0.006") * of_s5
    path = f"{ROOT}/configs/figures/mqar_zoology.py:conformal_sympow"
    config = resolve_implementation(parse_flags([f"--config={path}", *(f"--config.{flag}" for flag in flags)]))
    model = Model(config, 120 if of_s5 else 20)
    return model, make_train_step(model)


def padded(batch, length):
    return {name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in batch.items()}


def accuracy(model, params, task, asked_from):
    batch = padded(task.batch(1 << 40, 0, 256), LENGTH)
    asked = (batch["loss_mask"] > 0) & (np.arange(LENGTH) >= asked_from)
    right = Matcher(model, params, chunk_size=LENGTH).right(batch["inputs"], batch["targets"], asked)
    return right.sum() / asked.sum()


# task, length, chance, steps; the first element of a product is the answer to itself and does not count
CASES = [
    ("stack_recall", 16, 1 / 18, 200),
    ("forgetting_recall", 16, 1 / 10, 200),
    ("parity", 8, 1 / 2, 200),
    ("modular_counting", 6, 1 / 3, 300),
    ("s5", 2, 1 / 120, 400),
    ("multi_key", 16, 1 / 11, 300),
    ("variable_tracking", 24, 1 / 11, 300),
    ("common_words", 24, 1 / 11, 200),
    ("frequent_words", 24, 1 / 11, 200),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length", "chance", "steps"), CASES, ids=[case[0] for case in CASES])
def test_a_tiny_model_learns_the_task(name, length, chance, steps):
    assert {case[0] for case in CASES} | {"mqar", "copy", "selective_copy", "passkey"} == set(KINDS)
    model, step = trainer(name == "s5")
    one_chain = {"num_pairs": 1} if name == "variable_tracking" else {}
    task = make_task(name, length, dataclasses.replace(model.config.task, **one_chain))
    rows, first = (512, 1) if name == "s5" else (64, 1 if name in ("parity", "modular_counting") else 0)
    many = task.batch(1, 0, 2048)
    answers = many["targets"][:, first:][many["loss_mask"][:, first:] > 0]
    shares_are_uniform(answers, answers.min(), round(1 / chance))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = create_train_state(model, 0)
        before = accuracy(model, state.params, task, first)
        for number in range(steps):
            state, _ = step(state, padded(task.batch(0, number, rows), LENGTH if name != "s5" else 2))
    after = accuracy(model, state.params, task, first)
    print(name, before, after)
    way = 0.4 if name == "s5" else 0.7  # of what there is to learn
    assert before < chance + 0.07 and after > chance + way * (1 - chance), (before, after)
