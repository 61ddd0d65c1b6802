"""Tiny random checkpoints of each family with the logits that transformers gives: what tests/convert compares with.

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install -r requirements-oracle.txt
    /tmp/oracle/bin/python tests/golden/hf/make.py [NAME ...]

Writes NAME/config.json, NAME/model.safetensors and NAME/logits.npz beside this file. The weights are drawn so that no
norm, bias or gate is at its initial value and logits have a root mean square of 3. logits.npz holds `tokens_T` [T] and
`logits_T` [T, V] for T = 64, and for T = 300 the rows `rows_300` of them, all float32.
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import os
import pathlib
import sys

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
V, E, H, K, D, F, L = 96, 32, 4, 2, 8, 48, 2
SHORT, LONG, EVERY = 64, 300, 7
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


def make(name: str, folder: pathlib.Path) -> None:
    """Writes one case."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**settings, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    seed = sorted(CASES).index(name)
    _randomise(model, seed)
    draw = np.random.default_rng(1000 + seed)
    arrays = {f"tokens_{T}": draw.integers(0, V, T).astype(np.int32) for T in (SHORT, LONG)}
    arrays["rows_300"] = np.arange(LONG - 1, 0, -EVERY, dtype=np.int32)[::-1]
    _scale_logits(model, torch.tensor(arrays["tokens_64"].astype(np.int64))[None])
    with torch.no_grad():
        for T in (SHORT, LONG):
            arrays[f"logits_{T}"] = model(torch.tensor(arrays[f"tokens_{T}"].astype(np.int64))[None]).logits[0].numpy()
    arrays["logits_300"] = arrays["logits_300"][arrays["rows_300"]]
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "logits.npz", **arrays)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, rms {arrays['logits_300'].std():.2f}")


def main() -> None:
    """Makes the cases that are named, or all."""
    for name in sys.argv[1:] or CASES:
        make(name, HERE / name)


if __name__ == "__main__":
    main()
