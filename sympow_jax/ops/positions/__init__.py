"""Position encodings: rotary phases, additive biases and absolute embeddings, as pure functions."""

from sympow_jax.ops.positions.absolute import sinusoidal
from sympow_jax.ops.positions.bias_functions import (
    alibi_bias,
    alibi_init,
    fire_bias,
    fire_init,
    kerple_log_bias,
    kerple_log_init,
    kerple_power_bias,
    kerple_power_init,
    sandwich_bias,
    sandwich_init,
    t5_bias,
    t5_init,
)
from sympow_jax.ops.positions.biases import (
    alibi_slopes,
    fire_input,
    kerple_log,
    kerple_power,
    sandwich,
    t5_bucket,
)
from sympow_jax.ops.positions.rotary import (
    PhaseState,
    initial_phase_state,
    learned_phases,
    manifest_frequencies,
    rope_frequencies,
    rope_phases,
    rotate,
)

__all__ = [
    "PhaseState",
    "alibi_bias",
    "alibi_init",
    "alibi_slopes",
    "fire_bias",
    "fire_init",
    "fire_input",
    "initial_phase_state",
    "kerple_log",
    "kerple_log_bias",
    "kerple_log_init",
    "kerple_power",
    "kerple_power_bias",
    "kerple_power_init",
    "learned_phases",
    "manifest_frequencies",
    "rope_frequencies",
    "rope_phases",
    "rotate",
    "sandwich",
    "sandwich_bias",
    "sandwich_init",
    "sinusoidal",
    "t5_bias",
    "t5_bucket",
    "t5_init",
]
