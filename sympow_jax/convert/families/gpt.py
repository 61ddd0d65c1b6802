"""Families with LayerNorm and biases: GPT-2, GPT-NeoX (Pythia), BLOOM, StarCoder2."""

from collections.abc import Mapping, Sequence
from typing import Any

from sympow_jax.config import Config
from sympow_jax.convert.families.common import (
    ATTENTION,
    BIAS,
    COLUMNS,
    GELUS,
    LAYER,
    NAMES,
    ROWS,
    linear,
    llama_tensors,
    norm,
    norms,
    sizes,
    whole,
)
from sympow_jax.convert.family import Family, Tensor
from sympow_jax.convert.layouts import HeadRows
from sympow_jax.convert.parts import Derived, Fixed, Key
from sympow_jax.convert.rope import Rope
from sympow_jax.convert.windows import AllWindows

_SETTINGS = {"model.norm": "layernorm", "attention.bias": "all", "model.mlp_bias": "all"}
_QKV = ("mixer/query", "mixer/key", "mixer/value")


def _pre_norms(first: str, second: str) -> tuple[Tensor, ...]:
    return (*norm(first, "layers/{}/mixer_norm"), *norm(second, "layers/{}/mlp_norm"))


def _gpt2_tensors(config: Config) -> Sequence[Tensor]:
    """Projections are kept as here, [in, out]."""
    layer = "transformer.h.{}."
    return (
        Tensor("transformer.wte.weight", ("embedding/embedding",), COLUMNS),
        Tensor("transformer.wpe.weight", ("position_embedding/embedding",), COLUMNS),
        *linear(layer + "attn.c_attn", _QKV, COLUMNS),
        *linear(layer + "attn.c_proj", "mixer/out", COLUMNS),
        *linear(layer + "mlp.c_fc", "mlp/up", COLUMNS),
        *linear(layer + "mlp.c_proj", "mlp/down", COLUMNS),
        *_pre_norms(layer + "ln_1", layer + "ln_2"),
        *norm("transformer.ln_f", "final_norm"),
        Tensor("lm_head.weight", ("output",), ROWS),
    )


def _gpt2_mlp(theirs: Mapping[str, Any]) -> int:
    return 4 * whole(theirs, "n_embd")


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
        Key("vocab_size", "model.vocab_size", int),
        Key("n_positions", "data.seq_len", int, 1024),
        Key("n_positions", "position.max_length", int, 1024),
        Key("n_embd", "model.embed_dim", int),
        Key("n_layer", "model.num_layers", int),
        Key("n_head", "model.num_heads", int),
        Derived("model.head_dim", lambda theirs: whole(theirs, "n_embd") // whole(theirs, "n_head")),
        Key("n_inner", "model.mlp_dim", int, _gpt2_mlp),
        Key("activation_function", "model.mlp", str, "gelu_new", GELUS),
        Key("layer_norm_epsilon", "model.norm_eps", float, 1e-5),
        Key("tie_word_embeddings", "model.tied_embeddings", bool, True),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("reorder_and_upcast_attn", False),
    ),
    _SETTINGS | {"variant": "softmax_absolute", "model.embedding_norm": False},
    _gpt2_tensors,
    ("lm_head.weight", "transformer.wte.weight"),
    "transformer.",
    ("attn.bias", "attn.masked_bias"),
    frozenset(("n_ctx",)),
    {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
    | {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
)


def _neox_tensors(config: Config) -> Sequence[Tensor]:
    layer = "gpt_neox.layers.{}."
    return (
        Tensor("gpt_neox.embed_in.weight", ("embedding/embedding",), COLUMNS),
        *linear(layer + "attention.query_key_value", _QKV, HeadRows(config.model.num_heads)),
        *linear(layer + "attention.dense", "mixer/out"),
        *linear(layer + "mlp.dense_h_to_4h", "mlp/up"),
        *linear(layer + "mlp.dense_4h_to_h", "mlp/down"),
        *_pre_norms(layer + "input_layernorm", layer + "post_attention_layernorm"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        Tensor("embed_out.weight", ("output",), ROWS),
    )


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        Key("vocab_size", "model.vocab_size", int),
        Key("hidden_size", "model.embed_dim", int),
        Key("intermediate_size", "model.mlp_dim", int),
        Key("num_hidden_layers", "model.num_layers", int),
        Key("num_attention_heads", "model.num_heads", int),
        Derived("model.head_dim", lambda theirs: whole(theirs, "hidden_size") // whole(theirs, "num_attention_heads")),
        Key("tie_word_embeddings", "model.tied_embeddings", bool, False),
        Key("max_position_embeddings", "data.seq_len", int, 2048),
        Key("hidden_act", "model.mlp", str, "gelu", GELUS),
        Key("layer_norm_eps", "model.norm_eps", float, 1e-5),
        Key("use_parallel_residual", "model.parallel_residual", bool, True),
        Key("attention_bias", "attention.bias", bool, True, BIAS),
        Rope(fraction=0.25, own=("rotary_emb_base", "rotary_pct")),
    ),
    _SETTINGS | {"variant": "softmax_rope", "model.embedding_norm": False},
    _neox_tensors,
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    "gpt_neox.",
    ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)


def _bloom_tensors(config: Config) -> Sequence[Tensor]:
    layer = "transformer.h.{}."
    return (
        Tensor("transformer.word_embeddings.weight", ("embedding/embedding",), COLUMNS),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *linear(layer + "self_attention.query_key_value", _QKV, HeadRows(config.model.num_heads)),
        *linear(layer + "self_attention.dense", "mixer/out"),
        *linear(layer + "mlp.dense_h_to_4h", "mlp/up"),
        *linear(layer + "mlp.dense_4h_to_h", "mlp/down"),
        *_pre_norms(layer + "input_layernorm", layer + "post_attention_layernorm"),
        *norm("transformer.ln_f", "final_norm"),
        Tensor("lm_head.weight", ("output",), ROWS),
    )


BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    (
        Key("vocab_size", "model.vocab_size", int),
        Key("hidden_size", "model.embed_dim", int),
        Key("n_layer", "model.num_layers", int),
        Key("n_head", "model.num_heads", int),
        Derived("model.head_dim", lambda theirs: whole(theirs, "hidden_size") // whole(theirs, "n_head")),
        Derived("model.mlp_dim", lambda theirs: 4 * whole(theirs, "hidden_size")),
        Key("seq_length", "data.seq_len", int, 2048),
        Key("layer_norm_epsilon", "model.norm_eps", float, 1e-5),
        Key("tie_word_embeddings", "model.tied_embeddings", bool, True),
        Fixed("apply_residual_connection_post_layernorm", False),
    ),
    _SETTINGS | {"variant": "softmax_alibi", "model.embedding_norm": True, "model.mlp": "gelu"},
    _bloom_tensors,
    ("lm_head.weight", "transformer.word_embeddings.weight"),
    "transformer.",
    metadata=frozenset(("unk_token_id", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32",
                        "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi")),
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
)  # fmt: skip
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        *sizes(kv_heads=2, tied=True, length=4096),
        Key("norm_epsilon", "model.norm_eps", float, 1e-5),
        Key("hidden_act", "model.mlp", str, "gelu_pytorch_tanh", GELUS),
        Key("use_bias", "attention.bias", bool, True, BIAS),
        Key("use_bias", "model.mlp_bias", bool, True, BIAS),
        *(Rope(), AllWindows(None)),
    ),
    {"variant": "softmax_rope", "model.norm": "layernorm", "model.embedding_norm": False},
    llama_tensors(
        *ATTENTION,
        *linear(LAYER + "mlp.c_fc", "mlp/up"),
        *linear(LAYER + "mlp.c_proj", "mlp/down"),
        *norms(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    ),
    **NAMES,
    metadata=frozenset(("mlp_type", "norm_type", "activation_function")),
)

FAMILIES = (GPT2, GPT_NEOX, BLOOM, STARCODER2)
