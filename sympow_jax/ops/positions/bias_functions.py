"""The additive biases as attention takes them, `PositionBias`, and the initial parameters of the learned ones.

A bias function maps (params, q_positions [q], k_positions [k]) to [H, q, k] in float32; one of the distance alone maps
(params, distance [...]) to [H, ...] and is wrapped in `OfDistance`. Biases that are not learned take their constants as
params too, behind stop_gradient. A new learned bias is a function, an initial value, and a row of `_LEARNED`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops.positions.biases import (
    fire_input,
    kerple_log,
    kerple_power,
    sandwich_frequencies,
    sandwich_strengths,
    t5_bucket,
)
from sympow_jax.ops.positions.position_bias import OfDistance, PositionBias
from sympow_jax.ops.positions.relu_mlp import relu_mlp
from sympow_jax.ops.positions.rotary import phase_turns
from sympow_jax.typing import Array, Float, PRNGKeyArray

_KERPLE_FLOOR = 0.01
_FIRE_THRESHOLD = 512.0
_FIRE_MLP_DIM = 32
_T5_BUCKETS = 32

Params = dict[str, jax.Array]


def alibi_bias(slopes: Float[Array, "H"]) -> PositionBias:
    """ALiBi, -slope_h * distance, usually with `alibi_slopes`; the slopes are not learned."""
    return PositionBias({"slopes": slopes}, OfDistance(_alibi))


def is_alibi(bias: PositionBias) -> bool:
    """Whether it is that of `alibi_bias`, with any slopes."""
    return bias.function == OfDistance(_alibi)


def sandwich_bias(num_heads: int, *, dim: int = 128) -> PositionBias:
    """Sandwich (see `sandwich`), as the product of sinusoidal embeddings that it is; it has nothing to learn."""
    params = {
        "strengths": sandwich_strengths(num_heads),
        "frequencies": jnp.asarray(sandwich_frequencies(dim), jnp.float32),
    }
    return PositionBias(params, OfDistance(_sandwich, pairs=_sandwich_of_embeddings))


def init_bias(kind: str, key: PRNGKeyArray, num_heads: int) -> Params:
    """Initial parameters of a learned bias, from the distributions of its source.

    kerple_log: p [H] from U(0, 2), a [H] from U(0, 1). kerple_power: a [H] from U(0, 1), p [H] from U(0, 2).
    t5: a table [32, H] from N(0, 0.02^2). fire: c 0.1, threshold 1 (times 512), and a 1 -> 32 -> H MLP, weights and
    biases from U(-1, 1) and U(-1/sqrt(32), 1/sqrt(32)).
    """
    return _learned(kind)[0](key, num_heads)


def learned_bias(kind: str, params: Params) -> PositionBias:
    """The bias of one of the kinds of `init_bias`, with these parameters."""
    return PositionBias(params, _learned(kind)[1])


def _learned(kind: str):
    if kind not in _LEARNED:
        raise ValueError(f"kind={kind!r}: not a learned bias; legal are {', '.join(_LEARNED)}")
    return _LEARNED[kind]


def _alibi(params, distance):
    slopes = jax.lax.stop_gradient(params["slopes"])
    return -slopes.reshape(-1, *[1] * distance.ndim) * distance.astype(slopes.dtype)[None]


def _init_kerple(key, num_heads):
    p, a = jax.random.uniform(key, (2, num_heads), jnp.float32)
    return {"p": 2 * p, "a": a}


def _kerple_log(params, distance):
    """p and a are projected to >= 0.01."""
    p, a = _project(params["p"], _KERPLE_FLOOR), _project(params["a"], _KERPLE_FLOOR)
    return kerple_log(distance, p=p, a=a)


def _kerple_power(params, distance):
    """a is projected to >= 0.01 and p to [0.01, 2]."""
    a, p = _project(params["a"], _KERPLE_FLOOR), _project(params["p"], _KERPLE_FLOOR, 2.0)
    return kerple_power(distance, a=a, p=p)


def _init_t5(key, num_heads):
    return {"table": 0.02 * jax.random.normal(key, (_T5_BUCKETS, num_heads), jnp.float32)}


def _t5(params, distance):
    return params["table"].T[:, t5_bucket(distance, num_buckets=_T5_BUCKETS)]


def _sandwich(params, distance):
    strengths, frequencies = jax.lax.stop_gradient((params["strengths"], params["frequencies"]))
    total = jnp.sum(jnp.cos(phase_turns(distance, frequencies) * np.float32(2 * np.pi)) - 1.0, -1)
    return strengths.reshape(-1, *[1] * distance.ndim) * total.astype(strengths.dtype)[None]


def _sandwich_of_embeddings(params, q_positions, k_positions):
    """The sum of cosines as the product of embeddings that it is: for Q queries and K keys, Q + K of them."""
    strengths, frequencies = jax.lax.stop_gradient((params["strengths"], params["frequencies"]))

    def embed(positions):
        angles = phase_turns(positions, frequencies) * np.float32(2 * np.pi)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)

    q, k = embed(q_positions), embed(k_positions)
    total = jnp.einsum("qf,kf->qk", q, k, precision="highest") - frequencies.shape[0]
    return strengths[:, None, None] * total.astype(strengths.dtype)[None]


def _init_fire(key, num_heads):
    keys = jax.random.split(key, 4)

    def uniform(key, shape, fan_in):
        return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) / np.float32(np.sqrt(fan_in))

    return {
        "c": jnp.asarray(0.1, jnp.float32),
        "threshold": jnp.asarray(1.0, jnp.float32),
        "kernel_in": uniform(keys[0], (_FIRE_MLP_DIM,), 1),
        "bias_in": uniform(keys[1], (_FIRE_MLP_DIM,), 1),
        "kernel_out": uniform(keys[2], (_FIRE_MLP_DIM, num_heads), _FIRE_MLP_DIM),
        "bias_out": uniform(keys[3], (num_heads,), _FIRE_MLP_DIM),
    }


def _fire(params, q_positions, k_positions):
    """The MLP of `fire_input`; the threshold is |params["threshold"]| * 512."""
    threshold = jnp.abs(params["threshold"] * _FIRE_THRESHOLD)
    x = fire_input(q_positions[:, None], _distance(q_positions, k_positions), c=params["c"], threshold=threshold)
    return relu_mlp(x, params["kernel_in"], params["bias_in"], params["kernel_out"], params["bias_out"])


def _distance(q_positions, k_positions):
    return q_positions[:, None] - k_positions[None, :]


def _project(x, low, high=None):
    """Clips x; the gradient passes as if x had been set to the clipped value, so that x can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


_LEARNED = {
    "kerple_log": (_init_kerple, OfDistance(_kerple_log)),
    "kerple_power": (_init_kerple, OfDistance(_kerple_power)),
    "t5": (_init_t5, OfDistance(_t5)),
    "fire": (_init_fire, _fire),
}
