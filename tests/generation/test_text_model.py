"""Texts scored and continued as an evaluation harness asks: the model's own log-probabilities, its greedy text."""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from sympow_jax import lm_eval, sharding
from sympow_jax.config import ConfigError
from sympow_jax.files import FileError
from sympow_jax.generation.text_model import TextModel
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training.train_state import abstract_params
from tests.models.small import moved, tiny_config
from tests.test_generate import make_run


def text_model(variant: str = "conformal_sympow", *flags: str, **options):
    tokenizer = ByteTokenizer()
    model = Model(resolve_implementation(tiny_config(variant, *flags)), tokenizer.vocab_size)
    params = jax.device_put(moved(model.init(jax.random.key(0)), 0.1))
    return TextModel(model, params, tokenizer, batch_size=2, **options), jax.jit(model.logits), params


def logits_after(logits_of, params, ids, padded=32):
    """[len(ids), V] float64; what pads the row comes after it."""
    return np.asarray(logits_of(params, np.pad(ids, (0, padded - len(ids)))[None])[0], np.float64)[0, : len(ids)]


def log_p(logits_of, params, ids, padded=32):
    """log p(ids[i] | ids[:i]) of all but the first."""
    logits = logits_after(logits_of, params, ids[:-1], padded)
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.slow
def test_texts_are_scored_from_bos():
    texts, logits_of, params = text_model()
    each = log_p(logits_of, params, texts.encode("two words"))
    assert texts.whole(["", "two words"]) == [0, pytest.approx(each.sum(), rel=1e-6)]
    ((total, greedy),) = texts.log_likelihoods([(texts.encode("two "), list(b"words"))])
    assert total == pytest.approx(each[4:].sum(), rel=1e-6) and not greedy
    assert TextModel.encode(texts, "a", bos=False) == [97]


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_rope", "conformal_sympow", "based"])
def test_texts_are_continued_side_by_side_as_they_are_alone(variant):
    texts, logits_of, params = text_model(variant, *(["model.num_layers=1"] if variant == "softmax_rope" else []))
    prompts = {"two ": 4, "a": 7, "one more": 2}  # rows of other lengths, and more of them than are read side by side
    options = {"do_sample": False, "until": ["\n\n"]}
    more = texts.continuations([(prompt, options | {"max_gen_toks": most}) for prompt, most in prompts.items()])
    for text, (prompt, most) in zip(more, prompts.items(), strict=True):
        ids = texts.encode(prompt)
        for _ in range(most):
            ids.append(int(logits_after(logits_of, params, ids)[-1].argmax()))
        assert text == texts.tokenizer.decode(ids[len(prompt) + 1 :])
    assert texts._decoder.num_programs == 3  # of 8 tokens, of one, and of one for each row


@pytest.mark.parametrize(("axis", "spread"), [("data", False), ("tensor", True)])
def test_texts_are_continued_on_one_device_if_it_has_the_whole_model(axis, spread):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "seq": 1, axis: 2})
    model = Model(resolve_implementation(tiny_config("sympow")), 257, mesh)
    shapes = abstract_params(model)
    params = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), shapes)
    decoder = TextModel(model, params, ByteTokenizer())._decoder
    assert (decoder.model.mesh is not None) == spread
    assert {len(x.devices()) for x in jax.tree.leaves(decoder._params)} == {1 + spread}


@pytest.mark.slow
def test_a_bounded_text_is_covered_once_with_all_context_that_fits():
    texts, logits_of, params = text_model("softmax_absolute", "position.max_length=48")
    text = "".join(map(chr, range(33, 33 + 90)))
    ids = texts.encode(text)
    want = log_p(logits_of, params, ids[:49], 48).sum() + log_p(logits_of, params, ids[42:91], 48)[6:].sum()
    assert texts.whole([text])[0] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ConfigError, match="a continuation of 49 tokens: learned_absolute has 48 positions"):
        texts.log_likelihoods([([], list(range(49)))])


def test_a_repeated_request_draws_anew_and_all_calls_again_draw_the_same():
    texts, _, params = text_model("softmax_nope", "model.num_layers=1")
    request = ("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    drawn = texts.continuations([request] * 2) + texts.continuations([request])
    assert len({*drawn}) == 3
    again = TextModel(texts._model, params, texts.tokenizer)
    assert again.continuations([request]) + again.continuations([request] * 2) == drawn


def test_options_without_effect_and_every_name_of_a_length_are_taken():
    texts, _, _ = text_model("softmax_nope", "model.num_layers=1")
    options = {"num_beams": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "max_completion_tokens": 3}
    assert texts.continuations([("a", options)]) == texts.continuations([("a", {"max_gen_toks": 3})]) != [""]


def test_options_of_tasks_that_are_not_known_are_named():
    texts, _, _ = text_model()
    with pytest.raises(ConfigError, match="generation option 'stop_ids' is not known"):
        texts.continuations([("a", {"stop_ids": 4})])
    with pytest.raises(
        ConfigError, match="generation option num_beams = 4: legal is 1, which changes nothing; take it"
    ):
        texts.continuations([("a", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="an empty continuation has no log-likelihood"):
        texts.log_likelihoods([([1], [])])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=a"], "--workdir is missing"),
        (["--workdir=a"], "--tasks is missing"),
        (["--workdir=a", "--tasks=b", "--batch_size=0"], "--batch_size = 0: must be at least 1"),
        (["--workdir=a", "--tasks=b", "--seed=1,2"], "--seed = 1,2: give one number, or four: random_seed, "),
        (["--workdir=a", "--tasks=b", "--seed=-1"], "--seed = -1: must be from 0 to 4,294,967,295"),
    ],
)
def test_flags_of_the_command(flags, message):
    with pytest.raises(ConfigError, match=message):
        lm_eval.run(flags)


def test_a_seed_is_that_of_all_generators_of_the_harness_or_one_each():
    assert lm_eval._seeds({}) == {}
    assert set(lm_eval._seeds({"seed": "7"}).values()) == {7} and len(lm_eval._seeds({"seed": "7"})) == 4
    assert lm_eval._seeds({"seed": "0,1234,1234,5"})["fewshot_random_seed"] == 5


def test_results_are_written_whatever_they_are_and_their_place_is_looked_at_first(tmp_path, monkeypatch):
    results = {"results": {"t": {"acc": math.nan, "stderr": np.float32(0.5), "of": print}}}
    tasks = types.SimpleNamespace(match_tasks=lambda names: names)
    fake = types.SimpleNamespace(
        api=types.SimpleNamespace(model=types.SimpleNamespace(TemplateLM=object)),
        tasks=types.SimpleNamespace(TaskManager=lambda include_path: tasks),
        utils=types.SimpleNamespace(make_table=str),
        simple_evaluate=lambda random_seed, fewshot_random_seed, **options: results,
    )
    monkeypatch.setattr(lm_eval, "harness", lambda: fake)
    monkeypatch.setattr(lm_eval, "use_compilation_cache", lambda: None)
    output = tmp_path / "new" / "results.json"
    flags = [f"--workdir={make_run(tmp_path / 'run', 'softmax_nope')}", "--tasks=t", "--seed=3"]
    assert lm_eval.run([*flags, f"--output={output}"]) == 0
    found = json.loads(output.read_text())["results"]["t"]
    assert (found["acc"], found["stderr"]) == (None, 0.5) and "print" in found["of"]
    monkeypatch.setattr(lm_eval, "harness", None)
    with pytest.raises(FileError, match=r"--output = .*: .*results\.json is no folder; name another place"):
        lm_eval.run([*flags, f"--output={output}/more"])


def test_without_the_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'sympow_jax\[lm-eval\]'"):
        lm_eval.run(["--workdir=a", "--tasks=b"])
