"""Run configuration: from a locked ConfigDict, or a saved config.json, to checked frozen dataclasses.

This is the only file that knows ml_collections. `parse_flags` reads a command line, `resolve` turns the user's
values into a `Config` with every "variant", "auto" and 0 replaced, and raises ConfigError, one line, for anything
that is misspelt, out of range or contradictory, before anything is compiled or written.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import ml_collections

from sympow_jax import variants


class ConfigError(ValueError):
    """A wrong flag, key or value; the message is one line that says how to fix it."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder (keys and meanings: configs/default.py)."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    mlp: str
    norm: str
    embedding_norm: bool
    tied_embeddings: bool
    init_std: float
    dtype: str
    scan_layers: bool
    remat: str
    loss_block: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Kernel, position, gate and options of the attention layers."""

    kernel: str
    position: str
    gate: str
    gate_init: str
    gate_min_timescale: float
    gate_max_timescale: float
    degree: int
    feature_dim: int
    rebased_norm: str
    qk_norm: bool
    output_gate: bool
    window: int
    conv_width: int
    conv_expand: int
    layer_pattern: tuple[str, ...]
    implementation: str
    chunk_size: int


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Settings of the position encodings; those of rope and ALiBi may change at evaluation."""

    base: float
    convention: str
    scaling: str
    factor: float
    original_length: int
    max_length: int
    alibi_slope_scale: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Stores and batches."""

    train: str
    heldout: str
    seq_len: int
    batch_size: int
    order: str
    missing_chunks: str
    cache_bytes: int
    prefetch_batches: int
    num_threads: int


TASKS = ("mqar", "copy", "selective_copy", "passkey")  # data.train and data.heldout may name one


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Settings of the synthetic tasks."""

    vocab_size: int
    num_pairs: int
    num_passes: int
    power: float
    random_filler: bool
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; -1, for one of them, is what the others leave."""

    data: int
    fsdp: int
    tensor: int
    seq: int


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, schedule, clipping and accumulation."""

    name: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    final_fraction: float
    decay_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    z_loss: float
    accumulation_steps: int
    max_skipped_steps: int
    outlier_ratio: float


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss during training and the defaults of eval.py."""

    every_steps: int
    num_batches: int
    lengths: tuple[int, ...]
    num_documents: int
    chunk_size: int
    contextwise_length: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int
    keep_last: int
    keep_every: int
    keep_best: bool


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Metrics rows and the peak that MFU refers to."""

    every_steps: int
    tensorboard: bool
    wandb_project: str
    profile_steps: tuple[int, ...]
    peak_flops: float


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    variant: str
    seed: int
    num_train_steps: int
    model: ModelConfig
    attention: AttentionConfig
    position: PositionConfig
    data: DataConfig
    task: TaskConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig


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
    "attention.implementation": ("auto", "reference", "blockwise", "chunked", "recurrent"),
    "position.convention": ("standard", "manifest"),
    "position.scaling": ("none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"),
    "data.order": ("rectangle", "shuffled_chunks"),
    "data.missing_chunks": ("refuse", "exclude"),
    "optimizer.name": ("adamw", "adam", "muon"),
    "optimizer.schedule": ("cosine", "linear", "constant", "wsd"),
}

_MAY_BE_ZERO = {
    "seed", "model.num_kv_heads", "attention.chunk_size", "position.original_length",
    "position.max_length", "optimizer.warmup_steps", "optimizer.final_fraction", "optimizer.b1", "optimizer.b2",
    "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.z_loss", "optimizer.max_skipped_steps",
    "optimizer.outlier_ratio", "evaluation.every_steps", "evaluation.contextwise_length", "checkpoint.keep_every",
    "logging.peak_flops", "position.alibi_slope_scale",
}  # fmt: skip


def nearest(word: str, options: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest option, or an empty string."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """A dataclass from nested mappings; every key must exist, every type must fit."""
    _require(isinstance(values, Mapping), f"{path.rstrip('.') or 'config'} = {values!r}: expected a mapping")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        _require(key in fields, f"{path}{key}: no such key{nearest(key, list(fields))}")
    missing = [name for name in fields if name not in values]
    _require(not missing, f"{path}{missing[0] if missing else ''}: missing; configs/default.py lists every key")
    return cls(**{name: _convert(values[name], kind, path + name) for name, kind in fields.items()})


def _convert(value: Any, kind: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_convert(item, get_args(kind)[0], path) for item in items)
    if kind is float and type(value) is int:
        value = float(value)
    _require(type(value) is kind, f"{path} = {value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.num_layers': 4, ...} of a Config, or of nested mappings."""
    if dataclasses.is_dataclass(tree):
        tree = dataclasses.asdict(tree)  # pyright: ignore[reportArgumentType]
    if not isinstance(tree, Mapping):
        return {prefix: tuple(tree) if isinstance(tree, list) else tree}
    return {k: v for key in tree for k, v in flatten(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def _check_values(values: Mapping[str, Any]) -> None:
    for path, value in values.items():
        if path in _CHOICES:
            options = _CHOICES[path]
            hint = nearest(str(value), [str(o) for o in options])
            _require(value in options, f"{path} = {value!r}: choose one of {', '.join(map(str, options))}{hint}")
        elif path.startswith("mesh."):
            _require(value == -1 or value > 0, f"{path} = {value!r}: must be positive, or -1 to be inferred")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            ok = value >= 0 if path in _MAY_BE_ZERO else value > 0
            _require(ok, f"{path} = {value!r}: must be {'at least 0' if path in _MAY_BE_ZERO else 'positive'}")


def resolve(values: Mapping[str, Any]) -> Config:
    """Fills in "variant", "auto" and 0, checks every field and their combinations, and freezes the result.

    Args:
      values: nested mapping with exactly the keys of configs/default.py (a ConfigDict or a saved config.json).

    Raises:
      ConfigError: one line naming the field, its value, what is legal and how to fix it.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values)
    _check_values({"variant": config.variant})
    row = variants.VARIANTS[config.variant]
    m, a, p, d, e = config.model, config.attention, config.position, config.data, config.evaluation
    pick = {name: getattr(row, name) for name in ("kernel", "position", "gate", "gate_init")}
    attention = dataclasses.replace(
        a,
        **{name: choice if getattr(a, name) == "variant" else getattr(a, name) for name, choice in pick.items()},
        layer_pattern=row.layer_pattern if a.layer_pattern == ("variant",) else a.layer_pattern,
    )
    uses_max_length = attention.position == "learned_absolute" or p.convention == "manifest"
    head_dim = a.feature_dim if attention.kernel in ("taylor", "rebased") else m.head_dim
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(m, num_kv_heads=m.num_kv_heads or m.num_heads),
        attention=attention,
        position=dataclasses.replace(
            p,
            original_length=p.original_length or d.seq_len,
            max_length=p.max_length or (_longest(d, e) if uses_max_length else 0),
        ),
    )
    _check_values(flatten(config))
    _check_combinations(config, head_dim)
    return config


def _longest(data: DataConfig, evaluation: EvaluationConfig) -> int:
    return max(data.seq_len, evaluation.contextwise_length, *evaluation.lengths)


def _check_combinations(config: Config, head_dim: int) -> None:
    m, a, p, d, o, e = (
        config.model, config.attention, config.position, config.data, config.optimizer, config.evaluation,
    )  # fmt: skip
    _require(
        m.num_heads % m.num_kv_heads == 0,
        f"model.num_kv_heads = {m.num_kv_heads}: must divide model.num_heads = {m.num_heads}",
    )
    longest = _longest(d, e)
    for kind in a.layer_pattern:
        legal = ", ".join(variants.LAYER_KINDS)
        hint = nearest(kind, variants.LAYER_KINDS)
        _require(kind in variants.LAYER_KINDS, f"attention.layer_pattern has {kind!r}: choose from {legal}{hint}")
    rotary = a.position in variants.ROTARY_POSITIONS
    _require(
        not rotary or head_dim % 2 == 0,
        f"head_dim = {head_dim}: {a.position} rotates pairs, so it must be even",
    )
    linear = a.kernel in variants.LINEAR_KERNELS
    biased = a.position in variants.BIAS_POSITIONS and a.position != "alibi"
    _require(
        not (linear and biased and a.implementation in ("chunked", "recurrent")),
        f"attention.implementation = {a.implementation!r}: {a.position} is an additive bias, which a linear kernel "
        "computes only in the quadratic forms; use 'reference' or 'blockwise'",
    )
    _require(
        linear or a.implementation not in ("chunked", "recurrent"),
        f"attention.implementation = {a.implementation!r}: softmax has no linear form; use 'blockwise', 'reference' "
        "or 'auto'",
    )
    _require(
        not (linear and p.scaling == "dynamic_ntk"),
        "position.scaling = 'dynamic_ntk': it rotates old keys again as the text grows, which a finite state cannot "
        "do; use 'ntk' or 'yarn', or a softmax variant",
    )
    _require(
        p.scaling == "none" or a.position == "rope",
        f"position.scaling = {p.scaling!r}: only rope is scaled, and attention.position is {a.position!r}; use 'none'",
    )
    _require(
        p.scaling == "none" or p.convention == "standard",
        f"position.convention = {p.convention!r}: scalings are defined on the standard frequencies; set one of "
        "position.scaling = 'none' and position.convention = 'standard'",
    )
    _require(
        d.batch_size % o.accumulation_steps == 0,
        f"optimizer.accumulation_steps = {o.accumulation_steps}: must divide data.batch_size = {d.batch_size}",
    )
    for name in ("decay_fraction", "final_fraction"):
        value = getattr(o, name)
        _require(value <= 1, f"optimizer.{name} = {value}: a fraction is at most 1")
    stable = config.num_train_steps - o.warmup_steps - round(o.decay_fraction * config.num_train_steps)
    _require(
        o.schedule != "wsd" or stable >= 0,
        f"optimizer.decay_fraction = {o.decay_fraction}: with optimizer.warmup_steps = {o.warmup_steps} the decay of "
        f"wsd does not fit into num_train_steps = {config.num_train_steps}; lower one of the two",
    )
    _require(
        all(step >= 0 for step in config.logging.profile_steps),
        f"logging.profile_steps = {config.logging.profile_steps}: steps count from 1, and 0 means none",
    )
    _require(
        a.position != "learned_absolute" or longest <= p.max_length,
        f"position.max_length = {p.max_length}: learned_absolute needs a row for each position of data.seq_len and "
        f"evaluation.lengths; use at least {longest}",
    )
    _require(
        d.train == d.heldout or not {d.train, d.heldout} & {*TASKS},
        f"data.heldout = {d.heldout!r}: must equal data.train = {d.train!r} when one of them is a synthetic task, "
        "which has held-out examples of its own",
    )
    _require(
        not (d.train in TASKS and e.contextwise_length),
        f"evaluation.contextwise_length = {e.contextwise_length}: {d.train!r} has no loss by position; use 0",
    )
    _require(
        not (a.kernel == "rebased" and a.qk_norm),
        "attention.qk_norm = True: rebased normalises queries and keys itself; use false",
    )
    _require(
        p.alibi_slope_scale == 1 or a.position == "alibi",
        f"position.alibi_slope_scale = {p.alibi_slope_scale}: attention.position is {a.position!r}, which has no "
        "slopes; use 1.0, or a variant with alibi",
    )
    _require(
        a.position != "sinusoidal" or m.embed_dim % 2 == 0,
        f"model.embed_dim = {m.embed_dim}: sinusoidal positions are pairs of a sine and a cosine, so it must be even",
    )
    _require(a.conv_width >= 2, f"attention.conv_width = {a.conv_width}: a convolution needs at least 2 taps")
    _require(
        a.gate_min_timescale <= a.gate_max_timescale,
        f"attention.gate_min_timescale = {a.gate_min_timescale}: must not exceed gate_max_timescale",
    )


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted keys changed and everything checked again: override(c, {"position.scaling": "yarn"})."""
    known = flatten(config)
    tree = dataclasses.asdict(config)
    for path, value in changes.items():
        _require(path in known, f"{path}: no such key{nearest(path, list(known))}")
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = parse_value(value, known[path], path) if isinstance(value, str) else value
    return resolve(tree)


def parse_value(text: str, like: Any, path: str) -> Any:
    """A command-line string as the type of `like`."""
    if isinstance(like, tuple):
        items = (item.strip(" '\"") for item in text.strip("()").split(","))
        return tuple(parse_value(item, like[0], path) for item in items if item)
    if isinstance(like, bool):
        legal = {"true": True, "false": False, "1": True, "0": False}
        _require(text.lower() in legal, f"{path} = {text!r}: expected true or false")
        return legal[text.lower()]
    try:
        return type(like)(text.strip(" '\""))
    except ValueError:
        raise ConfigError(f"{path} = {text!r}: expected {type(like).__name__}") from None


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{path: (old, new)} of every field that differs."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def load_file(path: str) -> types.ModuleType:
    """The module of a config file (code that its user chose to run)."""
    file = pathlib.Path(path)
    if not file.is_file():
        known = sorted(str(f) for f in pathlib.Path("configs").rglob("*.py") if f.name != "__init__.py")
        raise ConfigError(f"--config = {path!r}: no such file{nearest(path, known)}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config = {path!r}: not a Python file; expected configs/NAME.py[:VARIANT]")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _require(hasattr(module, "get_config"), f"--config = {path!r}: defines no get_config(arg)")
    return module


def parse_flags(argv: Sequence[str]) -> Config:
    """`--config=FILE.py[:ARG] [--config.a.b=v ...]` -> Config; anything else in argv is an error."""
    named = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    _require(bool(named), "--config is missing: use --config=configs/quickstart.py[:VARIANT]; --list shows them")
    path, _, arg = named[-1].partition(":")
    sys.path.insert(0, ".")  # config files import configs.default
    if arg and arg not in variants.VARIANTS and "=" not in arg:
        hint = nearest(arg, list(variants.VARIANTS))
        _require("," in arg or arg.isdigit(), f"--config = {named[-1]!r}: no variant {arg!r}{hint}")
    values = load_file(path).get_config(*([arg] if arg else []))
    known = flatten(values.to_dict())
    for flag in argv:
        name = flag.removeprefix("--").partition("=")[0]
        if name != "config":
            _require(name.startswith("config."), f"--{name}: no such flag{nearest(name, ['config', 'workdir'])}")
            key = name.removeprefix("config.")
            _require(key in known, f"--{name}: no such key{nearest(key, list(known))}")
            node = values
            *parents, leaf = key.split(".")
            for parent in parents:
                node = node[parent]
            _require("=" in flag, f"--{name}: no value; write --{name}=VALUE")
            with node.ignore_type():
                node[leaf] = parse_value(flag.partition("=")[2], known[key], key)
    return resolve(values)
