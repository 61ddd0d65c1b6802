"""Options that the families of published models differ by, against a decoder written by hand in float64."""

import jax
import numpy as np
import pytest

from sympow_jax.models.model import Model
from tests.models import decoder_by_hand
from tests.models.small import VOCAB, moved, tiny_config

T = 20
GROUPED = ("model.num_heads=4", "model.head_dim=8", "model.num_kv_heads=2")
RMS = ("model.norm=rmsnorm", "model.norm_eps=1e-3", "model.embedding_norm=false")
# a parallel pass is compared with the decoder by hand, and a stream with the pass
FAMILIES = {
    "everything-sandwiched": (
        "softmax_rope", *GROUPED, *RMS, "model.norm_placement=sandwich", "model.mlp=geglu", "model.mlp_bias=all",
        "attention.bias=all", "attention.qk_norm=true", "attention.scale=0.7",
    ),
    "gpt-neox": (
        "softmax_rope", "model.parallel_residual=true", "attention.bias=all", "model.mlp=gelu_exact",
        "model.embedding_norm=false", "model.tied_embeddings=false",
    ),
    "gpt-2": ("softmax_absolute", "attention.bias=all", "model.embedding_norm=false"),
    "bloom": ("softmax_alibi", "attention.bias=all"),
    "qwen2": ("softmax_rope", *GROUPED, *RMS, "model.mlp=swiglu", "attention.bias=qkv", "model.tied_embeddings=false"),
    "olmo2": (
        "softmax_rope", *GROUPED, *RMS, "model.mlp=swiglu", "model.norm_placement=post", "attention.qk_norm=true",
        "attention.qk_norm_span=concatenated", "attention.qk_norm_eps=1e-3",
    ),
}  # fmt: skip
SOON = ("everything-sandwiched",)


@pytest.mark.parametrize(
    "family", [f if f in SOON else pytest.param(f, marks=[pytest.mark.slow, pytest.mark.quick]) for f in FAMILIES]
)
def test_a_family_is_its_decoder_by_hand_and_streams(family):
    config = tiny_config(*FAMILIES[family])
    model = Model(config, VOCAB)
    params = moved(jax.jit(model.init)(jax.random.key(0)), 0.2)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, T)).astype(np.int32)
    want = decoder_by_hand.logits(config, jax.tree.map(np.float64, params), tokens[0])
    run = jax.jit(model.logits)
    found, _ = run(params, tokens)
    spread = want.std()
    np.testing.assert_allclose(found[0], want, rtol=0, atol=3e-5 * spread)
    state, parts = model.initial_state(1, T), []
    for start, stop in ((0, 18), (18, 19), (19, T)):
        part, state = run(params, tokens[:, start:stop], state=state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), found, rtol=0, atol=1e-4 * spread)
