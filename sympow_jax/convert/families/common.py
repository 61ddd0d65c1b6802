"""What the tables of several families have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sympow_jax.config import Config, ConfigError
from sympow_jax.convert.family import Tensor
from sympow_jax.convert.layouts import Columns, Layout, Rows
from sympow_jax.convert.parts import REQUIRED, Derived, Key, Part, typed

ROWS, COLUMNS = Rows(), Columns()
BIAS = {True: "all", False: "none"}
GELUS = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


def whole(theirs: Mapping[str, Any], name: str) -> int:
    """A key that must be a positive whole number."""
    value = typed(name, theirs.get(name), int)
    if value < 1:
        raise ConfigError(f"{name} = {value}: must be positive")
    return value


def dims_per_head(theirs: Mapping[str, Any]) -> int:
    """head_dim where there is no key for it."""
    return whole(theirs, "hidden_size") // whole(theirs, "num_attention_heads")


def num_heads(theirs: Mapping[str, Any]) -> int:
    """num_key_value_heads where there is no key for it."""
    return whole(theirs, "num_attention_heads")


def root_of_size(theirs: Mapping[str, Any]) -> float:
    """What Gemma multiplies embeddings by."""
    return math.sqrt(whole(theirs, "hidden_size"))


def sizes(
    *, tied: bool, length: int, kv_heads: Any = num_heads, head_dim: Any = dims_per_head, mlp: Any = REQUIRED
) -> tuple[Part, ...]:
    """The keys of sizes that most families share; arguments say what absent ones mean."""
    return (
        Key("vocab_size", "model.vocab_size", int),
        Key("hidden_size", "model.embed_dim", int),
        Key("intermediate_size", "model.mlp_dim", int, mlp),
        Key("num_hidden_layers", "model.num_layers", int),
        Key("num_attention_heads", "model.num_heads", int),
        Key("num_key_value_heads", "model.num_kv_heads", int, kv_heads),
        Key("head_dim", "model.head_dim", int, head_dim),
        Key("tie_word_embeddings", "model.tied_embeddings", bool, tied),
        Key("max_position_embeddings", "data.seq_len", int, length),
    )


def rms_eps(default: float = 1e-6, *, qk_norm: bool = False) -> tuple[Part, ...]:
    """rms_norm_eps, of the norms of queries and keys too."""
    own = Key("rms_norm_eps", "model.norm_eps", float, default)
    return (own, Key("rms_norm_eps", "attention.qk_norm_eps", float, default)) if qk_norm else (own,)


def linear(theirs: str, ours: str | Sequence[str], layout: Layout = ROWS) -> tuple[Tensor, Tensor]:
    """A projection, or several in one tensor, and the bias."""
    names = (ours,) if isinstance(ours, str) else tuple(ours)
    return (
        Tensor(f"{theirs}.weight", tuple(f"layers/{{}}/{name}/kernel" for name in names), layout),
        Tensor(f"{theirs}.bias", tuple(f"layers/{{}}/{name}/bias" for name in names), layout),
    )


def norm(theirs: str, ours: str, layout: Layout = COLUMNS) -> tuple[Tensor, Tensor]:
    """The scale and the bias of a norm."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}/scale",), layout),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), layout),
    )


def llama_tensors(*layer: Tensor, scale: Layout = COLUMNS) -> Callable[[Config], Sequence[Tensor]]:
    """The tensors of a layer with embedding, final norm and output as Llama calls them."""
    rows = (
        Tensor("model.embed_tokens.weight", ("embedding/embedding",), COLUMNS),
        *layer,
        *norm("model.norm", "final_norm", scale),
        Tensor("lm_head.weight", ("output",), ROWS),
    )
    return lambda config: rows


LAYER = "model.layers.{}."
ATTENTION = (
    *linear(LAYER + "self_attn.q_proj", "mixer/query"),
    *linear(LAYER + "self_attn.k_proj", "mixer/key"),
    *linear(LAYER + "self_attn.v_proj", "mixer/value"),
    *linear(LAYER + "self_attn.o_proj", "mixer/out"),
)
GATED_MLP = (
    *linear(LAYER + "mlp.gate_proj", "mlp/gate"),
    *linear(LAYER + "mlp.up_proj", "mlp/up"),
    *linear(LAYER + "mlp.down_proj", "mlp/down"),
)


def qk_norms(scale: Layout = COLUMNS) -> tuple[Tensor, ...]:
    """The norms of queries and keys."""
    return (
        *norm(LAYER + "self_attn.q_norm", "layers/{}/mixer/query_norm", scale),
        *norm(LAYER + "self_attn.k_norm", "layers/{}/mixer/key_norm", scale),
    )


def norms(scale: Layout = COLUMNS, **names: str) -> tuple[Tensor, ...]:
    """Norms of a layer: our name = theirs."""
    return tuple(row for ours, theirs in names.items() for row in norm(LAYER + theirs, f"layers/{{}}/{ours}", scale))


PRE_NORMS = norms(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm")
NAMES: dict[str, Any] = {  # of Llama and most others
    "duplicate": ("lm_head.weight", "model.embed_tokens.weight"),
    "prefix": "model.",
    "buffers": ("rotary_emb.inv_freq",),
}
EMBEDDING_ROOT = Derived("model.embedding_scale", root_of_size)
