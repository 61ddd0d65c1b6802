"""Llama and what descends from it: RMSNorm, rope, gated MLP."""

from sympow_jax.convert.families.common import (
    ATTENTION,
    BIAS,
    COLUMNS,
    GATED_MLP,
    LAYER,
    NAMES,
    PRE_NORMS,
    linear,
    llama_tensors,
    norms,
    qk_norms,
    rms_eps,
    sizes,
)
from sympow_jax.convert.family import Family, Tensor
from sympow_jax.convert.parts import Fixed, Key
from sympow_jax.convert.rope import Rope
from sympow_jax.convert.windows import AllWindows, LayerTypes, last_layers

_SETTINGS = {
    "variant": "softmax_rope", "model.norm": "rmsnorm", "model.embedding_norm": False, "model.mlp": "swiglu",
    "model.mlp_bias": "none",
}  # fmt: skip
_SILU = Fixed("hidden_act", "silu")
_ATTENTION_BIAS = Key("attention_bias", "attention.bias", bool, False, BIAS)
_MLP_BIAS = Key("mlp_bias", "model.mlp_bias", bool, False, BIAS)
_QWEN_LAYERS = LayerTypes(last_layers, "use_sliding_window")

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*sizes(tied=False, length=2048), *rms_eps(), _SILU, Rope(), _ATTENTION_BIAS, _MLP_BIAS),
    _SETTINGS,
    llama_tensors(*ATTENTION, *GATED_MLP, *PRE_NORMS),
    **NAMES,
    metadata=frozenset(("is_llama_config", "transformers.js_config")),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (*sizes(kv_heads=8, tied=False, length=131_072), *rms_eps(), _SILU, Rope(), AllWindows(4096)),
    _SETTINGS,
    LLAMA.tensors,
    **NAMES,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (
        *sizes(kv_heads=32, tied=False, length=32_768),
        *rms_eps(),
        _SILU,
        Rope(),
        _QWEN_LAYERS,
    ),
    _SETTINGS | {"attention.bias": "qkv"},
    LLAMA.tensors,
    **NAMES,
)
_QWEN3_SIZES = sizes(kv_heads=32, head_dim=128, tied=False, length=32_768)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (*_QWEN3_SIZES, *rms_eps(qk_norm=True), _SILU, Rope(), _ATTENTION_BIAS, _QWEN_LAYERS),
    _SETTINGS | {"attention.qk_norm": True},
    llama_tensors(*ATTENTION, *qk_norms(), *GATED_MLP, *PRE_NORMS),
    **NAMES,
)
_FUSED = (
    *linear(LAYER + "self_attn.qkv_proj", ("mixer/query", "mixer/key", "mixer/value")),
    *linear(LAYER + "self_attn.o_proj", "mixer/out"),
    *linear(LAYER + "mlp.gate_up_proj", ("mlp/gate", "mlp/up")),
    *linear(LAYER + "mlp.down_proj", "mlp/down"),
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (*sizes(tied=False, length=4096), *rms_eps(1e-5), _SILU, Rope(fraction=1.0), AllWindows(None)),
    _SETTINGS,
    llama_tensors(*_FUSED, *PRE_NORMS),
    **NAMES,
    metadata=frozenset(("original_max_position_embeddings", "attention_bias", "auto_map")),
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (*sizes(tied=False, length=2048), *rms_eps(1e-5, qk_norm=True), _SILU, Rope(), _ATTENTION_BIAS),
    _SETTINGS | {"attention.qk_norm": True, "attention.qk_norm_span": "concatenated", "model.norm_placement": "post"},
    llama_tensors(
        *ATTENTION,
        *qk_norms(),
        *GATED_MLP,
        *norms(mixer_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"),
    ),
    **NAMES,
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    (
        *(*sizes(tied=False, length=2048), *rms_eps(), _SILU, Rope(), _ATTENTION_BIAS, _MLP_BIAS),
        Key("embedding_multiplier", "model.embedding_scale", float, 1.0),
        Key("residual_multiplier", "model.residual_scale", float, 1.0),
        Key("attention_multiplier", "attention.scale", float, 1.0),
        Key("logits_scaling", "model.logit_scale", float, 1.0, inverse=1.0),
    ),
    _SETTINGS,
    LLAMA.tensors,
    **NAMES,
)
_GATE = (
    *linear(LAYER + "self_attn.g_proj", "mixer/gate"),
    Tensor("", ("layers/{}/mixer/gate/bias",), COLUMNS),
)
BRUMBY = Family(  # Manifest AI's power retention: Qwen3 with a gate for each kv head in place of softmax
    "brumby",
    "BrumbyForCausalLM",
    (
        *(*sizes(kv_heads=8, head_dim=128, tied=False, length=32_768), *rms_eps(qk_norm=True), _SILU, Rope()),
        *(Fixed("attention_bias", False), Fixed("use_exp", False), LayerTypes(last_layers, "use_sliding_window")),
        Key("p", "attention.degree", int, 2),
    ),
    _SETTINGS | {"variant": "sympow_gated", "attention.qk_norm": True},
    llama_tensors(*ATTENTION, *qk_norms(), _GATE[0], _GATE[2], *GATED_MLP, *PRE_NORMS),
    **NAMES,
    metadata=frozenset(("chunk_size", "switch_over_seq_len", "prefill_chunk_size", "d_tile", "auto_map")),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, OLMO2, GRANITE, BRUMBY)
