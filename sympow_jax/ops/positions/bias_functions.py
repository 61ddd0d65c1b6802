"""Bias functions for `PositionBias` and their initial parameters.

Each function maps (params, q_positions [q], k_positions [k]) to a bias [H, q, k] in float32; each `*_init` makes the
params as the source does. A bias that is not learned takes its constants as params too, behind stop_gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.positions.biases import (
    alibi_slopes,
    fire_input,
    kerple_log,
    kerple_power,
    sandwich_frequencies,
    sandwich_strengths,
    t5_bucket,
)
from sympow_jax.ops.positions.relu_mlp import relu_mlp
from sympow_jax.ops.positions.rotary import phase_turns
from sympow_jax.typing import Array, Float, Int, PRNGKeyArray

_KERPLE_FLOOR = 0.01
_FIRE_THRESHOLD = 512.0

Params = dict[str, jax.Array]


def alibi_init(num_heads: int) -> Params:
    """The published slopes; they are not learned."""
    return {"slopes": jnp.asarray(alibi_slopes(num_heads), jnp.float32)}


def alibi_bias(params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> Float[Array, "H q k"]:
    """ALiBi, -slope_h * distance."""
    slopes = jax.lax.stop_gradient(params["slopes"])
    return -slopes[:, None, None] * _distance(q_positions, k_positions).astype(jnp.float32)[None]


def kerple_log_init(key: PRNGKeyArray, num_heads: int) -> Params:
    """p from U(0, 2), a from U(0, 1), per head."""
    key_p, key_a = jax.random.split(key)
    return {"p": 2 * jax.random.uniform(key_p, (num_heads,)), "a": jax.random.uniform(key_a, (num_heads,))}


def kerple_log_bias(
    params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]
) -> Float[Array, "H q k"]:
    """Kerple's logarithmic kernel; p and a are projected to >= 0.01."""
    p, a = _project(params["p"], _KERPLE_FLOOR), _project(params["a"], _KERPLE_FLOOR)
    return kerple_log(_distance(q_positions, k_positions), p=p, a=a)


def kerple_power_init(key: PRNGKeyArray, num_heads: int) -> Params:
    """a from U(0, 1), p from U(0, 2), per head."""
    return kerple_log_init(key, num_heads)


def kerple_power_bias(
    params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]
) -> Float[Array, "H q k"]:
    """Kerple's power kernel; a is projected to >= 0.01 and p to [0.01, 2]."""
    a, p = _project(params["a"], _KERPLE_FLOOR), _project(params["p"], _KERPLE_FLOOR, 2.0)
    return kerple_power(_distance(q_positions, k_positions), a=a, p=p)


def t5_init(key: PRNGKeyArray, num_heads: int, *, num_buckets: int = 32, stddev: float = 0.02) -> Params:
    """A table [num_buckets, H] from N(0, stddev^2)."""
    return {"table": stddev * jax.random.normal(key, (num_buckets, num_heads))}


def t5_bias(params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> Float[Array, "H q k"]:
    """T5's learned table over logarithmic buckets that end at distance 128, added to the scaled logits."""
    bucket = t5_bucket(_distance(q_positions, k_positions), num_buckets=params["table"].shape[0])
    return params["table"].T[:, bucket]


def sandwich_init(num_heads: int, *, dim: int = 128) -> Params:
    """Strength per head and radians per token; neither is learned."""
    return {
        "strengths": sandwich_strengths(num_heads),
        "frequencies": jnp.asarray(sandwich_frequencies(dim), jnp.float32),
    }


def sandwich_bias(params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> Float[Array, "H q k"]:
    """Sandwich, as the product of sinusoidal embeddings that it is: sum cos((i - j) f) = cos.cos + sin.sin."""
    strengths, frequencies = jax.lax.stop_gradient((params["strengths"], params["frequencies"]))

    def embed(positions):
        angles = phase_turns(positions, frequencies) * np.float32(2 * np.pi)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)

    q, k = embed(q_positions), embed(k_positions)
    total = jnp.einsum("qf,kf->qk", q, k, precision="highest") - frequencies.shape[0]
    return strengths[:, None, None] * total[None]


def fire_init(key: PRNGKeyArray, num_heads: int, *, mlp_dim: int = 32) -> Params:
    """c 0.1, threshold 1 x 512, and a 1 -> 32 -> H MLP from U(+-1) and U(+-1/sqrt(32)), biases included."""
    keys = jax.random.split(key, 4)

    def uniform(key, shape, fan_in):
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.float32(np.sqrt(fan_in))

    return {
        "c": jnp.asarray(0.1, jnp.float32),
        "threshold": jnp.asarray(1.0, jnp.float32),
        "kernel_in": uniform(keys[0], (mlp_dim,), 1),
        "bias_in": uniform(keys[1], (mlp_dim,), 1),
        "kernel_out": uniform(keys[2], (mlp_dim, num_heads), mlp_dim),
        "bias_out": uniform(keys[3], (num_heads,), mlp_dim),
    }


def fire_bias(params: Params, q_positions: Int[Array, "q"], k_positions: Int[Array, "k"]) -> Float[Array, "H q k"]:
    """FIRE: an MLP of `fire_input`, whose threshold is |params["threshold"]| * 512."""
    threshold = jnp.abs(params["threshold"] * _FIRE_THRESHOLD)
    x = fire_input(q_positions[:, None], _distance(q_positions, k_positions), c=params["c"], threshold=threshold)
    return relu_mlp(x, params["kernel_in"], params["bias_in"], params["kernel_out"], params["bias_out"])


def _distance(q_positions, k_positions):
    return q_positions[:, None] - k_positions[None, :]


def _project(x, low, high=None):
    """Clips x; the gradient passes as if x had been set to the clipped value, so that x can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)
