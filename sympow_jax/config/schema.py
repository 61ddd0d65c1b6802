"""The configuration as frozen dataclasses; configs/default.py says what each key means."""

import dataclasses

from sympow_jax import variants


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
    mlp_bias: str
    norm: str
    norm_eps: float
    norm_placement: str
    parallel_residual: bool
    vocab_size: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    embedding_norm: bool
    tied_embeddings: bool
    init_std: float
    dtype: str
    scan_layers: bool
    remat: str
    loss_block: int

    @property
    def is_gated_mlp(self) -> bool:
        """Whether a third projection gates the MLP's hidden features."""
        return self.mlp in ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Kernel, position, gate and options of an attention layer; `layer_specs` says which each layer has."""

    kernel: str
    position: str
    gate: str
    gate_init: str
    gate_min_timescale: float
    gate_max_timescale: float
    degree: int
    feature_dim: int
    rebased_norm: str
    scale: float
    bias: str
    qk_norm: bool
    qk_norm_span: str
    qk_norm_eps: float
    output_gate: bool
    output_norm: bool
    log_length_scale: bool
    sinks: bool
    window: int
    conv_width: int
    conv_expand: int
    layer_pattern: tuple[str, ...]
    blend_from: str
    blend_steps: int
    implementation: str
    chunk_size: int

    @property
    def is_linear(self) -> bool:
        """Whether the kernel has a finite feature expansion, hence a linear form with a state of constant size."""
        return self.kernel in variants.LINEAR_KERNELS

    @property
    def has_additive_bias(self) -> bool:
        """Whether the position is an additive bias of each pair; ALiBi, a fixed gate in linear kernels, is not."""
        return self.position in variants.BIAS_POSITIONS and self.position != "alibi"

    @property
    def uses_feature_dim(self) -> bool:
        """Whether queries and keys have `feature_dim` dims instead of model.head_dim."""
        return self.kernel in ("taylor", "rebased")

    @property
    def is_linear_form(self) -> bool:
        """Whether `implementation` names a form of linear time."""
        return self.implementation in ("chunked", "recurrent", "pallas")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Settings of the position encodings; those of rope and ALiBi may change at evaluation."""

    rotation: str
    rotation_rank: int
    base: float
    window_base: float
    rotary_fraction: float
    convention: str
    scaling: str
    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    mscale: float
    mscale_all_dim: float
    low_freq_factor: float
    high_freq_factor: float
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


TASKS = (  # data.train and data.heldout may name one; input_pipeline/tasks/task_store.py makes them
    "mqar",
    "copy",
    "selective_copy",
    "passkey",
    "stack_recall",
    "forgetting_recall",
    "parity",
    "modular_counting",
    "s5",
    "multi_key",
    "variable_tracking",
    "common_words",
    "frequent_words",
)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Settings of the synthetic tasks."""

    vocab_size: int
    num_pairs: int
    num_passes: int
    power: float
    random_filler: bool
    tokenizer: str
    modulus: int
    num_hops: int
    word_repeats: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; -1, for one of them, is what the others leave. And how many a CPU has."""

    data: int
    fsdp: int
    tensor: int
    seq: int
    cpu_devices: int


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
    state_dtype: str
    weight_decay: float
    clip_norm: float
    z_loss: float
    accumulation_steps: int
    max_skipped_steps: int
    outlier_ratio: float
    freeze: tuple[str, ...]
    learning_rates: tuple[str, ...]
    distill_layers: float
    distill_logits: float

    @property
    def distils(self) -> bool:
        """Whether the outputs of a frozen original are targets."""
        return self.distill_layers > 0 or self.distill_logits > 0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What a batch begins with."""

    initial_state: str


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
    training: TrainingConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
