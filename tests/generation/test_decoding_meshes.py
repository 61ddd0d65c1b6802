"""Text from any mesh is that of one device."""

import jax
import numpy as np
import pytest

from sympow_jax import generation, sharding
from sympow_jax.generation.check import check_layers, check_logits
from sympow_jax.models.model import Model, resolve_implementation
from tests.models.small import VOCAB, moved, tiny_config

MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "seq": 4}]
PROMPT = np.random.default_rng(0).integers(0, VOCAB, (1, 64)).astype(np.int32)  # one chunk


def models(variant: str, *flags: str):
    """A function from a mesh to a model and its parameters."""
    config = resolve_implementation(tiny_config(variant, "model.tied_embeddings=false", *flags))
    params = moved(Model(config, VOCAB).init(jax.random.key(0)), 0.1)

    def on(sizes: dict[str, int] | None):
        if sizes is None:
            return Model(config, VOCAB), params
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes)
        return Model(config, VOCAB, mesh), jax.device_put(params, sharding.tree_shardings(params, mesh))

    return on


def greedy(model, params, prompt: np.ndarray, count: int) -> np.ndarray:
    """[B, count] tokens after the prompt."""
    decoder = generation.Decoder(model, params)
    stream, tokens = decoder.start(len(prompt), prompt.shape[1] + count), []
    decoder.read(stream, prompt)
    for _ in range(count):
        tokens.append(np.argmax(stream.logits, axis=1).astype(np.int32))
        decoder.read(stream, tokens[-1][:, None])
    return np.stack(tokens, axis=1)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_rope", "softmax_fire", "fox", "conformal_sympow", "based"])
def test_every_mesh_has_the_text_of_one_device(variant):
    """64 tokens of two rows, which are cut in two, or in none where they do not divide."""
    on, prompt = models(variant), np.concatenate([PROMPT, PROMPT[:, ::-1]])
    want = greedy(*on(None), prompt, 64)
    assert len(np.unique(want)) > 4
    for sizes in MESHES:
        np.testing.assert_array_equal(greedy(*on(sizes), prompt, 64), want, err_msg=str(sizes))


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("variant", ["softmax_fire", "conformal_sympow", "conformal_vector_sympow", "based", "hybrid"])
def test_all_forms_agree_on_a_mesh(variant):
    model, params = models(variant)({"fsdp": 2, "tensor": 2, "seq": 2})
    results = check_layers(model, params, PROMPT)
    assert "prefill + decode" in {r.form for r in results}
    assert max(r.ratio for r in results) <= 1
    _, agree, total = check_logits(model, params, PROMPT)
    assert agree == total
