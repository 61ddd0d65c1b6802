"""Softmax attention tile by tile: running maximum and sum, memory linear in T, a backward pass that recomputes."""

from functools import partial
from typing import Any

import jax

from sympow_jax.ops.softmax_attention.inputs import Inputs
from sympow_jax.ops.softmax_attention.tile_sums import (
    Form,
    Softmax,
    Tiles,
    add_gradients,
    add_keys,
    empty_gradients,
    first_sums,
    gradients,
)
from sympow_jax.ops.softmax_attention.tiles import cut


def blockwise(x: Inputs, *, scale: float, window: int | None, block_size: int) -> jax.Array:
    """The same function as `reference`, in tiles of block_size positions."""
    q, k, v, q_rows, k_rows = cut(x, block_size)
    bias = x.bias_on(max(len(q), len(k)) * block_size, block_size)
    function, params = (None, None) if bias is None else (bias.function, bias.params)
    form = Form(Softmax(), scale, window, function)
    return joined(_attend(form, gates_within(q_rows, k_rows), Tiles(q, k, v, params, q_rows, k_rows, sinks_of(x))), x)


def sinks_of(x: Inputs) -> Any:
    """[H] -> [K, G]."""
    return None if x.sinks is None else x.sinks.reshape(x.k.shape[2], -1)


def gates_within(q_rows, k_rows) -> Any:
    """The gates that have a gradient, which are in the rows too."""
    return None if q_rows.gates is None else (q_rows.gates.within, k_rows.gates.within)


def joined(out: Any, x: Inputs) -> jax.Array:
    """[N, B, K, G, C, Dv] -> [B, T, H, Dv]."""
    B, T, H, _ = x.q.shape
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, out.shape[-1])[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Form, gates: Any, x: Tiles) -> jax.Array:
    return _forward(form, gates, x)[0]


def _forward(form, gates, x):
    del gates  # the same as in the rows; an argument of its own to have a gradient
    out, residuals = form.weights.finish(add_keys(form, first_sums(form, x), x), x.v.dtype)
    return out, (x, residuals)


def _backward(form, saved, d_out):
    x, residuals = saved
    rows = form.weights.rows(residuals, d_out)
    return gradients(form, x, rows, *add_gradients(form, empty_gradients(x), x, rows, d_out))


_attend.defvjp(_forward, _backward)
