"""What every value and every combination of values must satisfy, one group of keys after the other."""

import math
from collections.abc import Mapping
from typing import Any

from sympow_jax import variants
from sympow_jax.config.architecture import SMALLEST, check_architecture
from sympow_jax.config.errors import require, require_known
from sympow_jax.config.initial_state import check_initial_state
from sympow_jax.config.schema import TASKS, Config

_CHOICES = {
    "variant": tuple(variants.VARIANTS),
    "model.mlp": ("gelu", "gelu_exact", "swiglu", "geglu", "none"),
    "model.mlp_bias": ("auto", "none", "all"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_placement": ("pre", "post", "sandwich"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "dots", "attention", "offload"),
    "attention.kernel": variants.KERNELS,
    "attention.position": variants.POSITIONS,
    "attention.gate": variants.GATES,
    "attention.gate_init": variants.GATE_INITS,
    "attention.degree": (2, 4, 6),
    "attention.rebased_norm": ("head", "concatenated"),
    "attention.bias": ("none", "qkv", "all"),
    "attention.qk_norm_span": ("head", "concatenated"),
    "attention.blend_from": ("none", *variants.BLENDABLE),
    "attention.implementation": ("auto", "reference", "blockwise", "chunked", "recurrent", "pallas"),
    "position.rotation": ("variant", *variants.ROTATIONS),
    "position.convention": ("standard", "manifest"),
    "position.scaling": ("none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"),
    "data.order": ("rectangle", "shuffled_chunks", "stream"),
    "data.missing_chunks": ("refuse", "exclude"),
    "optimizer.name": ("adamw", "adam", "muon"),
    "optimizer.state_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("cosine", "linear", "constant", "wsd"),
    "training.initial_state": ("zero", "carried", "noise", "other_document"),
}

_MAY_BE_ZERO = {
    "seed", "model.num_kv_heads", "model.vocab_size", "model.logit_softcap",
    "attention.chunk_size", "attention.scale", "position.original_length",
    "position.max_length", "optimizer.warmup_steps", "optimizer.final_fraction", "optimizer.b1", "optimizer.b2",
    "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.z_loss", "optimizer.max_skipped_steps",
    "optimizer.outlier_ratio", "evaluation.every_steps", "evaluation.contextwise_length", "checkpoint.keep_every",
    "logging.peak_flops", "position.alibi_slope_scale", "position.window_base", "position.attention_factor",
    "position.mscale_all_dim", "attention.blend_steps", "optimizer.distill_layers", "optimizer.distill_logits",
}  # fmt: skip


_LARGEST = 3.4028235e38  # of float32
_LARGEST_B1 = 0.99  # a step moves the mean by 1 - b1 of the gradient, and bfloat16 rounds to 2^-9


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


def check_combinations(config: Config) -> None:
    """Raises ConfigError for values that are legal alone and not together."""
    check_architecture(config)
    _check_optimizer(config)
    _check_data(config)
    check_initial_state(config)


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
    require(
        o.state_dtype == "float32" or o.b1 <= _LARGEST_B1,
        f"optimizer.b1 = {o.b1}: a mean over so many steps does not move in bfloat16; use at most {_LARGEST_B1}, or "
        "optimizer.state_dtype=float32",
    )
    for item in () if o.learning_rates == ("none",) else o.learning_rates:
        pattern, _, rate = item.rpartition("=")
        require(
            bool(pattern) and _is_positive(rate),
            f"optimizer.learning_rates has {item!r}: write PATTERN=RATE with a positive rate, *gate*=1e-2",
        )
    require(o.eps >= SMALLEST, f"optimizer.eps = {o.eps}: is 0 in float32 and would divide 0 by 0; use 1e-8")
    for name in ("decay_fraction", "final_fraction"):
        value = getattr(o, name)
        require(value <= 1, f"optimizer.{name} = {value}: a fraction is at most 1")
    for name, steps in (("num_train_steps", config.num_train_steps), ("optimizer.warmup_steps", o.warmup_steps)):
        counted = name != "num_train_steps" or o.schedule in ("linear", "wsd")
        require(
            not counted or steps < 2**31, f"{name} = {steps}: a schedule counts steps in int32; use at most {2**31 - 1}"
        )
    stable = config.num_train_steps - o.warmup_steps - round(o.decay_fraction * config.num_train_steps)
    require(
        o.schedule != "wsd" or stable >= 0,
        f"optimizer.decay_fraction = {o.decay_fraction}: with optimizer.warmup_steps = {o.warmup_steps} the decay of "
        f"wsd does not fit into num_train_steps = {config.num_train_steps}; lower one of the two",
    )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) <= _LARGEST
    except ValueError:
        return False


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
