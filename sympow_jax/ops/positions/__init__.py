"""Position encodings: rotary phases, additive biases and absolute embeddings, as pure functions."""

from sympow_jax.ops.positions.absolute import sinusoidal
from sympow_jax.ops.positions.bias_functions import alibi_bias, init_bias, learned_bias, sandwich_bias
from sympow_jax.ops.positions.biases import (
    alibi_slopes,
    fire_input,
    kerple_log,
    kerple_power,
    sandwich,
    t5_bucket,
)
from sympow_jax.ops.positions.frequencies import ScalingConstants, manifest_frequencies, rope_frequencies
from sympow_jax.ops.positions.rotary import (
    PhaseState,
    cos_sin,
    differentiable,
    initial_phase_state,
    learned_phases,
    phase_state,
    rope_phases,
    rotate,
    rotate_by,
    sum_phases,
)

__all__ = [
    "PhaseState",
    "ScalingConstants",
    "alibi_bias",
    "alibi_slopes",
    "cos_sin",
    "differentiable",
    "fire_input",
    "init_bias",
    "initial_phase_state",
    "kerple_log",
    "kerple_power",
    "learned_bias",
    "learned_phases",
    "manifest_frequencies",
    "phase_state",
    "rope_frequencies",
    "rope_phases",
    "rotate",
    "rotate_by",
    "sandwich",
    "sandwich_bias",
    "sinusoidal",
    "sum_phases",
    "t5_bucket",
]
