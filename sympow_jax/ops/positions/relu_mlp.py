"""A one-input ReLU MLP, evaluated as the piecewise-linear function that it is.

out_h(x) = bias_out_h + sum_u kernel_out_uh relu(kernel_in_u x + bias_in_u) changes slope only at one x per hidden unit.
On one tile of an attention matrix x covers a narrow range, where most units are on throughout or off throughout:
those add up to one straight line, and only the few that switch inside the range are visited.
"""

import jax
import jax.numpy as jnp

from sympow_jax.ops.loops import expected_trips_in_all
from sympow_jax.ops.platform import target_platform
from sympow_jax.typing import Array, Float


@jax.custom_vjp
def relu_mlp(
    x: Float[Array, "q k"],
    kernel_in: Float[Array, "U"],
    bias_in: Float[Array, "U"],
    kernel_out: Float[Array, "U H"],
    bias_out: Float[Array, "H"],
) -> Float[Array, "H q k"]:
    """bias_out + kernel_out^T relu(kernel_in x + bias_in), for every entry of x; exact up to rounding."""
    return _forward(x, kernel_in, bias_in, kernel_out, bias_out)[0]


def _units(x, kernel_in, bias_in):
    """Which units are on for all of x; the units that switch within x, first in `order`, and their number."""
    ends = kernel_in[:, None] * jnp.stack([x.min(), x.max()])[None, :] + bias_in[:, None]
    always = (ends > 0).all(1)
    switches = (ends > 0).any(1) & ~always
    return always, jnp.argsort(~switches), switches.sum()


def _switches(kernel_in: Array) -> float:
    """Expected over the tiles of a row: a quarter of the units switch in [0, 1], in two tiles each, which overlap."""
    return kernel_in.shape[0] / 2


def _lines(always, kernel_in, bias_in, kernel_out):
    """Slope and offset [H] of the units that are always on."""
    weights = jnp.where(always[:, None], kernel_out, 0.0)
    return (weights * kernel_in[:, None]).sum(0), (weights * bias_in[:, None]).sum(0)


def _forward(x, kernel_in, bias_in, kernel_out, bias_out):
    always, order, count = _units(x, kernel_in, bias_in)
    slope, offset = _lines(always, kernel_in, bias_in, kernel_out)
    line = slope[:, None, None] * x[None] + (offset + bias_out)[:, None, None]

    def add_unit(n, out):
        u = order[n]
        hidden = jnp.maximum(kernel_in[u] * x + bias_in[u], 0.0)
        return out + kernel_out[u][:, None, None] * hidden[None]

    with expected_trips_in_all(_switches(kernel_in)):
        out = jax.lax.fori_loop(0, count, add_unit, line)
    return out, (x, kernel_in, bias_in, kernel_out)


def _backward(residuals, d_out):
    x, kernel_in, bias_in, kernel_out = residuals
    always, order, count = _units(x, kernel_in, bias_in)
    slope, _ = _lines(always, kernel_in, bias_in, kernel_out)
    # A unit's gradients follow from two sums over the entries where it is on: of d_out, and of d_out x.
    every = jnp.ones(x.shape, bool)
    totals, moments = (jnp.where(always[:, None], s[None], 0.0) for s in _sums(d_out, x, every))

    def add_unit(n, carry):
        d_x, totals, moments = carry
        u = order[n]
        on = kernel_in[u] * x + bias_in[u] > 0
        total, moment = _sums(d_out, x, on)
        d_x += jnp.where(on, _over_heads(d_out, kernel_in[u] * kernel_out[u]), 0.0)
        return d_x, totals.at[u].set(total), moments.at[u].set(moment)

    carry = _over_heads(d_out, slope), totals, moments
    with expected_trips_in_all(_switches(kernel_in)):
        d_x, totals, moments = jax.lax.fori_loop(0, count, add_unit, carry)
    d_kernel_out = kernel_in[:, None] * moments + bias_in[:, None] * totals
    d_bias_out = d_out.sum((1, 2))
    return d_x, (kernel_out * moments).sum(1), (kernel_out * totals).sum(1), d_kernel_out, d_bias_out


def _sums(d_out, x, on):
    """Sums over the entries that are on [H] of d_out and of d_out x; on a CPU as products, which are 6 times faster."""
    if target_platform() != "cpu":
        masked = jnp.where(on[None], d_out, 0.0)
        return masked.sum((1, 2)), (masked * x[None]).sum((1, 2))
    rows = d_out.reshape(d_out.shape[0], -1)

    def times(factors):
        return jnp.einsum("hn,n->h", rows, factors.reshape(-1).astype(rows.dtype), precision="highest")

    return times(on), times(jnp.where(on, x, 0.0))


def _over_heads(d_out, weights):
    """sum_h weights_h d_out_h [q, k]; head by head, because XLA's CPU reduction over a leading axis is 100x slower."""
    return sum(d_out[h] * weights[h] for h in range(d_out.shape[0]))


relu_mlp.defvjp(_forward, _backward)
