"""One tiny configuration for tests of models and training."""

import pathlib

import jax
import numpy as np

from sympow_jax.config import Config, parse_flags
from sympow_jax.typing import PyTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = (
    "model.num_layers=2", "model.scan_layers=true", "model.embed_dim=32", "model.num_heads=2",
    "model.head_dim=16", "model.mlp_dim=48",
    "attention.feature_dim=4", "attention.window=8", "data.seq_len=24", "evaluation.lengths=24,48",
)  # fmt: skip
VOCAB = 61
MECHANISMS = (  # variants, or the hybrid, that stand for all where a test is dear
    "softmax_rope", "softmax_fire", "softmax_absolute", "fox", "conformal_sympow", "conformal_vector_sympow", "based",
    "rebased", "hybrid",
)  # fmt: skip
PATTERNS = {  # of three layers
    "based": ("based", "attention.layer_pattern=gated_conv,attention,window"),  # one layer of each of its kinds
    "hybrid": (  # rows of the table, none of them the variant's own
        *("fox", "attention.layer_pattern=conformal_sympow,softmax_rope,based"),
        *("attention.log_length_scale=true", "attention.output_norm=true", "attention.sinks=true"),
    ),
}


def tiny_config(variant: str, *flags: str) -> Config:
    """A two-layer model of width 32, or one of PATTERNS."""
    variant, *pattern = PATTERNS.get(variant, (variant,))
    flags = (*TINY, *(("model.num_layers=3", *pattern) if pattern else ()), *flags)
    return parse_flags([f"--config={ROOT}/configs/quickstart.py:{variant}", *(f"--config.{flag}" for flag in flags)])


def moved(params: PyTree, deviation: float) -> PyTree:
    """Parameters away from their initial point, where some of them do nothing; float32, made without a compiler."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.asarray(x) + deviation * rng.standard_normal(x.shape).astype(np.float32), params)
