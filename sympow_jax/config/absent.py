"""Saved configurations of earlier versions: what a key that they do not have meant.

Whoever adds a key adds a row, with the value under which the program does what it did before the key was there. It is
not the key's default: a new default may be another behaviour, a row never is.
"""

import copy
from collections.abc import Mapping
from typing import Any

from sympow_jax.config.resolve import resolve
from sympow_jax.config.schema import Config

# key, value that it had when it was not there; the oldest rows first
ABSENT: tuple[tuple[str, Any], ...] = (
    ("optimizer.decay_fraction", 0.2),  # of wsd, which is as old
    ("optimizer.z_loss", 0.0),
    ("logging.wandb_project", ""),
    ("logging.profile_steps", (0,)),
    ("optimizer.outlier_ratio", 0.0),
    ("task.vocab_size", 8_192),  # of tasks, which are as old as these keys
    ("task.num_pairs", 8),
    ("task.num_passes", 1),
    ("task.power", 0.01),
    ("task.random_filler", True),
    ("task.tokenizer", "byte"),
    ("evaluation.contextwise_length", 0),
    ("mesh.data", 1),  # one device
    ("mesh.fsdp", 1),
    ("mesh.tensor", 1),
    ("mesh.seq", 1),
    ("model.mlp_bias", "auto"),
    ("model.norm_eps", 1e-5),
    ("model.norm_placement", "pre"),
    ("model.parallel_residual", False),
    ("attention.scale", 0.0),
    ("attention.bias", "none"),
    ("attention.qk_norm_span", "head"),
    ("attention.qk_norm_eps", 1e-6),
    ("model.vocab_size", 0),
    ("model.embedding_scale", 1.0),
    ("model.residual_scale", 1.0),
    ("model.logit_scale", 1.0),
    ("model.logit_softcap", 0.0),
    ("mesh.cpu_devices", 1),
    ("position.window_base", 0.0),
    ("position.rotary_fraction", 1.0),
    ("position.beta_fast", 32.0),
    ("position.beta_slow", 1.0),
    ("position.truncate", True),
    ("position.attention_factor", 0.0),
    ("position.mscale", 1.0),
    ("position.mscale_all_dim", 0.0),
    ("position.low_freq_factor", 1.0),
    ("position.high_freq_factor", 4.0),
    ("attention.output_norm", False),
    ("attention.log_length_scale", False),
    ("attention.blend_from", "none"),
    ("attention.blend_steps", 0),
    ("optimizer.freeze", ("none",)),
    ("optimizer.learning_rates", ("none",)),
    ("optimizer.distill_layers", 0.0),
    ("optimizer.distill_logits", 0.0),
    ("attention.sinks", False),
    ("task.modulus", 5),  # of tasks that were not there, likewise the next two
    ("task.num_hops", 4),
    ("task.word_repeats", (30, 3)),
    ("optimizer.state_dtype", "float32"),
    ("training.initial_state", "zero"),
    ("position.rotation", "scalar"),  # of conformal_vector_sympow too
    ("position.rotation_rank", 16),
)


def resolve_saved(values: Mapping[str, Any]) -> Config:
    """The `Config` of a saved config.json of this or an earlier version.

    Raises:
      ConfigError: a key that this version does not know, or one missing that every version had; one line.
    """
    return resolve(_complete(values))


def _complete(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        return values
    tree = copy.deepcopy(dict(values))
    for key, value in ABSENT:
        group, _, name = key.partition(".")
        node = tree.setdefault(group, {})
        if isinstance(node, dict):
            node.setdefault(name, value)
    return tree
