"""Gemma: norms that keep their scale less 1, embeddings times the root of their size, GeGLU."""

from sympow_jax.convert.families.common import (
    ATTENTION,
    BIAS,
    EMBEDDING_ROOT,
    GATED_MLP,
    NAMES,
    llama_tensors,
    norms,
    qk_norms,
    rms_eps,
    sizes,
)
from sympow_jax.convert.family import Family
from sympow_jax.convert.layouts import ScaleMinusOne
from sympow_jax.convert.parts import Cap, Fixed, Key
from sympow_jax.convert.rope import Rope
from sympow_jax.convert.windows import LayerTypes, all_but_every

_SETTINGS = {
    "variant": "softmax_rope", "model.norm": "rmsnorm", "model.embedding_norm": False, "model.mlp": "geglu",
    "model.mlp_bias": "none",
}  # fmt: skip
_TANH = "gelu_pytorch_tanh"
_GEGLU = {_TANH: "geglu", "gelu": "geglu"}  # first files of Gemma 1 say gelu and mean the other
_ATTENTION_BIAS = Key("attention_bias", "attention.bias", bool, False, BIAS)
_SCALE = ScaleMinusOne()
_SANDWICH = norms(
    _SCALE,
    mixer_norm="input_layernorm",
    mixer_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    (
        *(*sizes(kv_heads=16, head_dim=256, tied=True, length=8192), *rms_eps(), Rope(), _ATTENTION_BIAS),
        *(Key("hidden_act", "model.mlp", str, _TANH, _GEGLU), Fixed("hidden_activation", _TANH), EMBEDDING_ROOT),
    ),
    _SETTINGS,
    llama_tensors(
        *ATTENTION,
        *GATED_MLP,
        *norms(_SCALE, mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
        scale=_SCALE,
    ),
    **NAMES,
)
_QUERY_SCALE = Key("query_pre_attn_scalar", "attention.scale", int, 256, inverse=0.5)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        *(*sizes(kv_heads=4, head_dim=256, tied=True, length=8192), *rms_eps(), Rope(), _ATTENTION_BIAS),
        *(Fixed("hidden_activation", _TANH), EMBEDDING_ROOT, _QUERY_SCALE, LayerTypes(all_but_every(2))),
        *(Cap("final_logit_softcapping", "model.logit_softcap", 30.0), Cap("attn_logit_softcapping", "", 50.0)),
    ),
    _SETTINGS | {"model.norm_placement": "sandwich"},
    llama_tensors(*ATTENTION, *GATED_MLP, *_SANDWICH, scale=_SCALE),
    **NAMES,
    metadata=frozenset(("cache_implementation", "hidden_act")),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (
        *(*sizes(kv_heads=4, head_dim=256, tied=True, length=131_072), *rms_eps(qk_norm=True), _ATTENTION_BIAS),
        *(Fixed("hidden_activation", _TANH), EMBEDDING_ROOT, _QUERY_SCALE, LayerTypes(all_but_every(6))),
        *(Cap("final_logit_softcapping", "model.logit_softcap", None), Cap("attn_logit_softcapping", "", None)),
        Rope(1_000_000.0, window_base=10_000.0),
    ),
    _SETTINGS | {"model.norm_placement": "sandwich", "attention.qk_norm": True},
    llama_tensors(*ATTENTION, *qk_norms(_SCALE), *GATED_MLP, *_SANDWICH, scale=_SCALE),
    **NAMES,
    metadata=frozenset(("cache_implementation",)),
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3)
