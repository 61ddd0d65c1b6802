"""What every value and every combination of values must satisfy, one group of keys after the other."""

import math
from collections.abc import Mapping
from typing import Any

from sympow_jax import variants
from sympow_jax.config.errors import require, require_known
from sympow_jax.config.schema import TASKS, Config

_CHOICES = {
    "variant": tuple(variants.VARIANTS),
    "model.mlp": ("gelu", "swiglu", "none"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "dots", "attention", "offload"),
    "attention.kernel": variants.KERNELS,
    "attention.position": variants.POSITIONS,
    "attention.gate": variants.GATES,
    "attention.gate_init": variants.GATE_INITS,
    "attention.degree": (2, 4, 6),
    "attention.rebased_norm": ("head", "concatenated"),
    "attention.implementation": ("auto", "reference", "blockwise", "chunked", "recurrent", "pallas"),
    "position.convention": ("standard", "manifest"),
    "position.scaling": ("none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"),
    "data.order": ("rectangle", "shuffled_chunks"),
    "data.missing_chunks": ("refuse", "exclude"),
    "optimizer.name": ("adamw", "adam", "muon"),
    "optimizer.schedule": ("cosine", "linear", "constant", "wsd"),
}

MAX_LAYERS = 10_000  # a number from a damaged or foreign config.json would build layers for days

_MAY_BE_ZERO = {
    "seed", "model.num_kv_heads", "attention.chunk_size", "position.original_length",
    "position.max_length", "optimizer.warmup_steps", "optimizer.final_fraction", "optimizer.b1", "optimizer.b2",
    "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.z_loss", "optimizer.max_skipped_steps",
    "optimizer.outlier_ratio", "evaluation.every_steps", "evaluation.contextwise_length", "checkpoint.keep_every",
    "logging.peak_flops", "position.alibi_slope_scale",
}  # fmt: skip


_SMALLEST, _LARGEST = 1.1754944e-38, 3.4028235e38  # of the normal float32


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that is not legal by itself; keys are dotted."""
    for path, value in values.items():
        if path in _CHOICES:
            options = _CHOICES[path]
            legal = [str(o) for o in options]
            require_known(f"{path} = {value!r}: choose one of {', '.join(legal)}", str(value), legal)
        elif path.startswith("mesh."):
            require(value == -1 or value > 0, f"{path} = {value!r}: must be positive, or -1 to be inferred")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            finite = math.isfinite(value) and (isinstance(value, int) or abs(value) <= _LARGEST)
            require(finite, f"{path} = {value!r}: must be a finite number that float32 holds")
            ok = value >= 0 if path in _MAY_BE_ZERO else value > 0
            require(ok, f"{path} = {value!r}: must be {'at least 0' if path in _MAY_BE_ZERO else 'positive'}")


def longest(config: Config) -> int:
    """The longest sequence that the config trains on or evaluates."""
    return max(config.data.seq_len, config.evaluation.contextwise_length, *config.evaluation.lengths)


def check_combinations(config: Config) -> None:
    """Raises ConfigError for values that are legal alone and not together."""
    _check_attention(config)
    _check_position(config)
    _check_optimizer(config)
    _check_data(config)


def _check_attention(config: Config) -> None:
    m, a = config.model, config.attention
    require(m.num_layers <= MAX_LAYERS, f"model.num_layers = {m.num_layers}: at most {MAX_LAYERS:,}")
    require(
        m.num_heads % m.num_kv_heads == 0,
        f"model.num_kv_heads = {m.num_kv_heads}: must divide model.num_heads = {m.num_heads}",
    )
    for kind in a.layer_pattern:
        legal = ", ".join(variants.LAYER_KINDS)
        require_known(f"attention.layer_pattern has {kind!r}: choose from {legal}", kind, variants.LAYER_KINDS)
    require(
        not (a.is_linear and a.has_additive_bias and a.is_linear_form),
        f"attention.implementation = {a.implementation!r}: {a.position} is an additive bias, which a linear kernel "
        "computes only in the quadratic forms; use 'reference' or 'blockwise'",
    )
    require(
        a.is_linear or not a.is_linear_form,
        f"attention.implementation = {a.implementation!r}: softmax has no linear form; use 'blockwise', 'reference' "
        "or 'auto'",
    )
    require(
        not (a.implementation == "pallas" and a.kernel == "power" and a.degree != 2),
        f"attention.implementation = 'pallas': it has attention.degree = 2, not {a.degree}; use 'chunked' or 'auto'",
    )
    require(
        not (a.kernel == "rebased" and a.qk_norm),
        "attention.qk_norm = True: rebased normalises queries and keys itself; use false",
    )
    require(a.conv_width >= 2, f"attention.conv_width = {a.conv_width}: a convolution needs at least 2 taps")
    require(
        a.gate_min_timescale <= a.gate_max_timescale,
        f"attention.gate_min_timescale = {a.gate_min_timescale}: must not exceed gate_max_timescale",
    )


def _check_position(config: Config) -> None:
    m, a, p = config.model, config.attention, config.position
    head_dim = a.feature_dim if a.uses_feature_dim else m.head_dim
    require(
        a.position not in variants.ROTARY_POSITIONS or head_dim % 2 == 0,
        f"head_dim = {head_dim}: {a.position} rotates pairs, so it must be even",
    )
    require(
        not (a.is_linear and p.scaling == "dynamic_ntk"),
        "position.scaling = 'dynamic_ntk': it rotates old keys again as the text grows, which a finite state cannot "
        "do; use 'ntk' or 'yarn', or a softmax variant",
    )
    require(
        p.scaling == "none" or a.position == "rope",
        f"position.scaling = {p.scaling!r}: only rope is scaled, and attention.position is {a.position!r}; use 'none'",
    )
    require(
        p.scaling == "none" or p.convention == "standard",
        f"position.convention = {p.convention!r}: scalings are defined on the standard frequencies; set one of "
        "position.scaling = 'none' and position.convention = 'standard'",
    )
    require(
        p.scaling == "none" or p.factor >= 1,
        f"position.factor = {p.factor}: {p.scaling} reaches further than position.original_length; use at least 1",
    )
    require(
        p.scaling != "yarn" or p.base > 1,
        f"position.base = {p.base}: yarn takes its logarithm; use a base above 1, such as 10000",
    )
    require(
        a.position != "learned_absolute" or longest(config) <= p.max_length,
        f"position.max_length = {p.max_length}: learned_absolute needs a row for each position of data.seq_len and "
        f"evaluation.lengths; use at least {longest(config)}",
    )
    require(
        p.alibi_slope_scale == 1 or a.position == "alibi",
        f"position.alibi_slope_scale = {p.alibi_slope_scale}: attention.position is {a.position!r}, which has no "
        "slopes; use 1.0, or a variant with alibi",
    )
    require(
        a.position != "sinusoidal" or m.embed_dim % 2 == 0,
        f"model.embed_dim = {m.embed_dim}: sinusoidal positions are pairs of a sine and a cosine, so it must be even",
    )


def check_scaling_acts(config: Config) -> None:
    """Raises ConfigError for a position.scaling that leaves every frequency as it is: a factor of 1.

    A run that was trained so can be read and continued; nothing new starts so.
    """
    p = config.position
    require(
        p.scaling in ("none", "dynamic_ntk") or p.factor != 1,
        f"position.factor = {p.factor}: position.scaling = {p.scaling!r} changes nothing with it; set position.factor "
        f"to the longest context over position.original_length = {p.original_length}, or position.scaling = 'none'",
    )


def _check_optimizer(config: Config) -> None:
    d, o = config.data, config.optimizer
    require(
        d.batch_size % o.accumulation_steps == 0,
        f"optimizer.accumulation_steps = {o.accumulation_steps}: must divide data.batch_size = {d.batch_size}",
    )
    for name in ("b1", "b2"):
        value = getattr(o, name)
        below = value < 1 - 2**-25  # above it, float32 rounds to 1, and the bias correction divides 0 by 0
        require(below, f"optimizer.{name} = {value}: must be below 1 also in float32, for example 0.999")
    require(o.eps >= _SMALLEST, f"optimizer.eps = {o.eps}: is 0 in float32 and would divide 0 by 0; use 1e-8")
    for name in ("decay_fraction", "final_fraction"):
        value = getattr(o, name)
        require(value <= 1, f"optimizer.{name} = {value}: a fraction is at most 1")
    stable = config.num_train_steps - o.warmup_steps - round(o.decay_fraction * config.num_train_steps)
    require(
        o.schedule != "wsd" or stable >= 0,
        f"optimizer.decay_fraction = {o.decay_fraction}: with optimizer.warmup_steps = {o.warmup_steps} the decay of "
        f"wsd does not fit into num_train_steps = {config.num_train_steps}; lower one of the two",
    )


def _check_data(config: Config) -> None:
    d, e = config.data, config.evaluation
    require(
        min(e.lengths, default=0) > 0,
        f"evaluation.lengths = {e.lengths}: name one or more numbers of tokens, such as 512,1024",
    )
    require(
        d.train == d.heldout or not {d.train, d.heldout} & {*TASKS},
        f"data.heldout = {d.heldout!r}: must equal data.train = {d.train!r} when one of them is a synthetic task, "
        "which has held-out examples of its own",
    )
    require(
        not (d.train in TASKS and e.contextwise_length),
        f"evaluation.contextwise_length = {e.contextwise_length}: {d.train!r} has no loss by position; use 0",
    )
    require(
        all(step >= 0 for step in config.logging.profile_steps),
        f"logging.profile_steps = {config.logging.profile_steps}: steps count from 1, and 0 means none",
    )
