"""A softmax decoder in NumPy and float64, written from the papers: what the options of a model must compute."""

import math

import numpy as np

from sympow_jax.config import Config
from sympow_jax.models.transformer import layer_runs

_erf = np.vectorize(math.erf)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_exact": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": _gelu,
}


def _linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def normed(p, x, eps, *, centred):
    """LayerNorm (centred) or RMSNorm over the last dim."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0.0)


def _attention(config: Config, kind: str, p, x):
    """[T, E] -> [T, E] of one document."""
    m, a = config.model, config.attention
    T, H, K, D = len(x), m.num_heads, m.num_kv_heads, m.head_dim
    q, k, v = (_linear(p[name], x) for name in ("query", "key", "value"))
    if a.qk_norm and a.qk_norm_span == "concatenated":
        q, k = (normed(p[f"{n}_norm"], y, a.qk_norm_eps, centred=False) for n, y in (("query", q), ("key", k)))
    q, k, v = q.reshape(T, H, D), k.reshape(T, K, D), v.reshape(T, K, D)
    if a.qk_norm and a.qk_norm_span == "head":
        q, k = (normed(p[f"{n}_norm"], y, a.qk_norm_eps, centred=False) for n, y in (("query", q), ("key", k)))
    if a.position == "rope":
        q, k = _rotated(config, kind, q), _rotated(config, kind, k)
    scores = np.einsum("ihd,jhd->hij", q, k.repeat(H // K, 1)) * (a.scale or D**-0.5)
    distance = np.arange(T)[:, None] - np.arange(T)
    if a.position == "alibi":
        scores -= distance * (2.0 ** (-8 * np.arange(1, H + 1) / H))[:, None, None]
    seen = (distance >= 0) & (distance < (a.window if kind == "window" else T))
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    return _linear(p["out"], np.einsum("hij,jhd->ihd", weights, v.repeat(H // K, 1)).reshape(T, H * D))


def _rotated(config: Config, kind: str, x):
    p, half = config.position, round(config.position.rotary_fraction * x.shape[-1]) // 2
    own = kind == "window" and p.window_base
    frequencies = (p.window_base if own else p.base) ** (-np.arange(half) / half)
    frequencies /= p.factor if p.scaling == "linear" and not own else 1.0
    turned = x[..., :half] + 1j * x[..., half : 2 * half]
    turned = turned * np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None]
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def _mlp(config: Config, p, x):
    activation = ACTIVATIONS[config.model.mlp]
    hidden = activation(_linear(p["gate"], x)) * _linear(p["up"], x) if "gate" in p else activation(_linear(p["up"], x))
    return _linear(p["down"], hidden)


def logits(config: Config, params, tokens):
    """[T] -> [T, V] of one document."""
    m = config.model

    def norm(p, name, x):
        return normed(p[name], x, m.norm_eps, centred=m.norm == "layernorm") if name in p else x

    table = params["embedding"]["embedding"]
    x = m.embedding_scale * table[tokens]
    if config.attention.position == "learned_absolute":
        x = x + params["position_embedding"]["embedding"][: len(tokens)]
    x = norm(params, "embedding_norm", x)
    for i, (spec, depth) in enumerate(layer_runs(config)):
        for n in range(depth):
            p = _layer(params[f"blocks_{i}"], n)
            mixed = norm(p, "mixer_out_norm", _attention(config, spec.name, p["mixer"], norm(p, "mixer_norm", x)))
            mixed = x + m.residual_scale * mixed
            read = norm(p, "mlp_norm", x if m.parallel_residual else mixed)
            x = mixed + m.residual_scale * norm(p, "mlp_out_norm", _mlp(config, p["mlp"], read))
    found = m.logit_scale * norm(params, "final_norm", x) @ (table.T if m.tied_embeddings else params["output"])
    return m.logit_softcap * np.tanh(found / m.logit_softcap) if m.logit_softcap else found


def _layer(tree, n):
    return {k: _layer(v, n) if isinstance(v, dict) else v[n] for k, v in tree.items()}
