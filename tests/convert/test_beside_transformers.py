"""Imported models beside what transformers makes of them (tests/golden/hf/figures.json, by measure.py there)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import eval as eval_command
from sympow_jax import prepare
from sympow_jax.config import override
from sympow_jax.convert.importing import import_folder, open_folder, read_parameters
from sympow_jax.generation import Decoder, Sampling, sample
from sympow_jax.input_pipeline.opening import open_data
from sympow_jax.loading import load
from sympow_jax.models.model import Model
from tests.convert.cases import GOLDEN, make_folder

FIGURES = json.loads((GOLDEN / "figures.json").read_text())
LENGTHS = (64, 128, 256)


def documents() -> np.ndarray:
    """As measure.py draws them."""
    return np.random.default_rng(19).integers(3, 96, (8, 256))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A store of the documents by the tokenizer of the cases, and the numbers of those held out."""
    folder = tmp_path_factory.mktemp("corpus")
    import_folder(str(make_folder("llama", folder / "in")), str(folder / "w"))
    for number, row in enumerate(documents()):
        (folder / f"{number}.txt").write_text(" ".join(f"t{token}" for token in row))
    made = [f"--output={folder / 'c'}", f"--tokenizer={folder / 'w' / 'tokenizer'}", "--document_length=256"]
    assert prepare.run(["text", str(folder / "?.txt"), *made, "--heldout_fraction=0.5"]) == 0
    store = open_data(str(folder / "c"), split="heldout", seq_len=256)
    rows = store.read(slice(0, store.num_documents), slice(0, 256)).tolist()
    return folder / "c", [documents().tolist().index(row) for row in rows]


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("case", FIGURES["nll"])
def test_the_loss_of_every_length_and_sixty_tokens_are_those_of_transformers(case, corpus, tmp_path):
    import_folder(str(make_folder(case, tmp_path / "in")), str(tmp_path / "w"))
    flags = [f"--data={corpus[0]}", f"--lengths={','.join(map(str, LENGTHS))}", "--num_documents=8"]
    assert eval_command.run([f"--workdir={tmp_path / 'w'}", *flags]) == 0
    found = json.loads((tmp_path / "w" / "eval" / "length_generalisation.json").read_text())["lengths"]
    want = np.asarray(FIGURES["nll"][case])[corpus[1]].mean(0)
    assert [row["nll"] for row in found] == pytest.approx(want.tolist(), abs=1e-5)

    model, params, _ = load(str(tmp_path / "w"))
    prompt, tokens = documents()[:1, :40], []
    decoder = Decoder(model, params)
    stream = decoder.start(1, 100)
    decoder.read(stream, prompt)
    for position in range(40, 100):
        tokens.append(int(sample(stream.logits, position, Sampling(temperature=0.0))[0]))
        decoder.read(stream, np.asarray([tokens[-1:]]))
    assert tokens == FIGURES["greedy"][case]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt_neox", "gpt2", "gemma"])  # the nearest to transformers
def test_bfloat16_costs_no_more_than_it_costs_transformers(case, tmp_path):
    foreign = open_folder(str(make_folder(case, tmp_path / "in")))
    params = read_parameters(foreign)["params"]
    tokens = np.random.default_rng(20).integers(0, 96, (32, 128))
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = Model(override(foreign.model.config, {"model.dtype": dtype}), 96)
        with jax.numpy_dtype_promotion("standard"):  # as flax's norms need it
            logits[dtype] = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens))[0], np.float64)
    error = np.sqrt(((logits["float32"] - logits["bfloat16"]) ** 2).mean())
    assert 0.5 < error / FIGURES["bfloat16"][case] <= 1
