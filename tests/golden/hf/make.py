"""Tiny random checkpoints of each family with the logits that transformers gives: what tests/convert compares with.

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install -r requirements-oracle.txt
    /tmp/oracle/bin/python tests/golden/hf/make.py [NAME ...]

Writes NAME/config.json, NAME/model.safetensors and NAME/logits.npz beside this file. The weights are drawn so that no
norm, bias or gate is at its initial value and logits have a root mean square of 3. logits.npz holds `tokens_T` [T] and
`logits_T` [T, V] for T = 64, for T = 300 the rows `rows_300` of them, and for one case of each family that has so many
positions the last 16 for T = 2,048. The last are made in float64, rotary phases too: transformers' own are off by 1e-4
radians there.
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import json
import os
import pathlib
import sys
import zlib

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
V, E, H, K, D, F, L = 96, 32, 4, 2, 8, 48, 2
SHORT, LONG, EVERY = 64, 300, 7
FAR, LAST = 2048, 16
FAR_CASES = (
    "llama", "mistral", "qwen2", "qwen3", "brumby", "phi3", "gemma", "gemma2", "gemma3", "olmo2", "bloom", "starcoder2",
    "granite", "gpt_neox",
)  # fmt: skip
_LOGIT_RMS = 3.0

_GPT2 = {"n_embd": E, "n_head": H, "n_layer": L, "n_inner": 4 * E, "n_positions": 320, "vocab_size": V}
_BASE = {
    "vocab_size": V, "hidden_size": E, "num_attention_heads": H, "num_hidden_layers": L, "intermediate_size": F,
    "max_position_embeddings": 320,
}  # fmt: skip
_GQA = _BASE | {"num_key_value_heads": K}
_HEADS = _GQA | {"head_dim": 16}
_LLAMA2 = _GQA | {"rms_norm_eps": 1e-5}


def _rope(kind: str, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


_TRAINED_AT = {"original_max_position_embeddings": 80}
CASES = {
    "llama": ("Llama", _GQA | {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", _HEADS | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_bias": ("Llama", _LLAMA2 | {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", _LLAMA2 | _rope("linear", factor=4.0)),
    "llama_dynamic": ("Llama", _LLAMA2 | {"max_position_embeddings": 80} | _rope("dynamic", factor=2.0)),
    "llama_yarn": ("Llama", _LLAMA2 | _rope("yarn", factor=4.0, **_TRAINED_AT)),
    "llama_llama3": (
        "Llama", _LLAMA2 | _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **_TRAINED_AT)
    ),
    "mistral": ("Mistral", _HEADS | {"sliding_window": 48, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", _GQA),
    "qwen3": ("Qwen3", _HEADS),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _BASE | {"rotary_pct": 0.25, "hidden_act": "gelu", "intermediate_size": 4 * E}),
    "gpt_neox_serial": ("GPTNeoX", _BASE | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "phi3": ("Phi3", _GQA | {"pad_token_id": 0}),
    "gemma": ("Gemma", _HEADS),
    "gemma3": (
        "Gemma3Text",
        _HEADS | {"sliding_window": 48, "query_pre_attn_scalar": 12, "num_hidden_layers": 4,
                  "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma2": (
        "Gemma2",
        _HEADS | {"sliding_window": 48, "query_pre_attn_scalar": 12, "attn_logit_softcapping": None},
    ),
    "olmo2": ("Olmo2", _GQA | {"rms_norm_eps": 1e-6}),
    "bloom": ("Bloom", {"vocab_size": V, "hidden_size": E, "n_head": H, "n_layer": L}),
    "starcoder2": ("Starcoder2", _GQA | {"sliding_window": None}),
    "brumby": ("Qwen3", _HEADS),  # made into Brumby by _exchange_attention
    "granite": (
        "Granite",
        _GQA | {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.2},
    ),
}  # fmt: skip


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices ~ normal(0, 1 / fan_in), norms ~ their initial value + normal(0, 0.2), biases ~ normal(0, 0.2)."""
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.tensor(draw.standard_normal(tuple(value.shape)), dtype=torch.float32)
            if value.ndim == 2:
                is_conv1d = type(model).__name__.startswith("GPT2") and ".h." in name
                value.copy_(noise / value.shape[0 if is_conv1d else 1] ** 0.5)
            else:
                value.copy_(value + 0.2 * noise)


def _scale_logits(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Scales the final norm so that the logits have _LOGIT_RMS."""
    base = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    with torch.no_grad():
        factor = _LOGIT_RMS / float(model(tokens).logits.square().mean().sqrt())
        shift = 1.0 if type(model).__name__.startswith("Gemma") else 0.0  # its scale is 1 + weight
        norm.weight.copy_((norm.weight + shift) * factor - shift)
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(norm.bias * factor)


def _exchange_attention(model: torch.nn.Module) -> None:
    """Manifest AI's power retention in place of softmax, from the formula of their Brumby, in float64.

    weight_ij = (q_i . k_j / sqrt(D))^2 prod gates(j+1..i), normalised over j; gates are sigmoid(W x), one a kv head.
    """

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        log_gates = torch.nn.functional.logsigmoid(module.gate.double()).transpose(1, 2).cumsum(-1)  # [B, K, T]
        groups = query.shape[1] // key.shape[1]
        repeat = lambda x: x.double().repeat_interleave(groups, dim=1)  # noqa: E731
        scores = (query.double() @ repeat(key).transpose(2, 3) * scaling) ** 2
        decay = repeat(log_gates)[..., :, None] - repeat(log_gates)[..., None, :]
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = torch.where(causal, scores * torch.exp(decay.masked_fill(~causal, 0.0)), 0.0)
        out = (weights @ repeat(value)) / weights.sum(-1, keepdim=True)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def note_gate(module, args, kwargs):
        module.gate = module.g_proj(kwargs["hidden_states"])

    transformers.AttentionInterface.register("power", attend)
    model.set_attn_implementation("power")
    for layer in model.model.layers:
        layer.self_attn.g_proj = torch.nn.Linear(E, K, bias=False)
        layer.self_attn.register_forward_pre_hook(note_gate, with_kwargs=True)


def _as_brumby(folder: pathlib.Path) -> None:
    """config.json as Brumby's class writes it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "brumby", "architectures": ["BrumbyForCausalLM"]}
    config |= {"p": 2, "use_exp": False, "chunk_size": 64, "switch_over_seq_len": 8192, "prefill_chunk_size": 1024}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _exact_rotary(model: torch.nn.Module) -> None:
    """Computes the phases of unscaled rotary encodings in float64."""
    config, settings = model.config, model.config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(x, position_ids, layer_type=None):
        own = settings[layer_type] if layer_type else settings
        dim = int(own.get("partial_rotary_factor", 1.0) * head_dim)
        turns = position_ids[..., None] * own["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.cat([turns, turns], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    model.base_model.rotary_emb.forward = forward


def make(name: str, folder: pathlib.Path) -> None:
    """Writes one case."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**settings, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if name == "brumby":
        _exchange_attention(model)
    seed = zlib.crc32(name.encode())
    _randomise(model, seed)
    draw = np.random.default_rng(seed + 1)
    arrays = {f"tokens_{T}": draw.integers(0, V, T).astype(np.int32) for T in (SHORT, LONG)}
    arrays["rows_300"] = np.arange(LONG - 1, 0, -EVERY, dtype=np.int32)[::-1]
    _scale_logits(model, torch.tensor(arrays["tokens_64"].astype(np.int64))[None])
    with torch.no_grad():
        for T in (SHORT, LONG):
            arrays[f"logits_{T}"] = model(torch.tensor(arrays[f"tokens_{T}"].astype(np.int64))[None]).logits[0].numpy()
    arrays["logits_300"] = arrays["logits_300"][arrays["rows_300"]]
    model.save_pretrained(folder)
    if name == "brumby":
        _as_brumby(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name in FAR_CASES:
        if hasattr(model.base_model, "rotary_emb"):
            _exact_rotary(model)
        arrays["tokens_2048"] = draw.integers(0, V, FAR).astype(np.int32)
        with torch.no_grad():
            tokens = torch.tensor(arrays["tokens_2048"].astype(np.int64))[None]
            arrays["logits_2048"] = model.double()(tokens).logits[0, -LAST:].float().numpy()
    np.savez_compressed(folder / "logits.npz", **arrays)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, rms {arrays['logits_300'].std():.2f}")


def main() -> None:
    """Makes the cases that are named, or all."""
    for name in sys.argv[1:] or CASES:
        make(name, HERE / name)


if __name__ == "__main__":
    main()
