"""Rows of a table whose columns are cut over devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sympow_jax.sharding.mesh import BATCH, axis_size, dividing, over_shards
from sympow_jax.typing import AnyArray, Array, Float, Int


def look_up(table: Float[Array, "V E"], index: Int[AnyArray, "B T"], dtype: DTypeLike) -> Float[Array, "B T E"]:
    """table[index] in `dtype`; a table cut along E stays cut, in its gradient too.

    A device looks up its columns for the tokens of all devices along fsdp, and they exchange columns for rows: it
    receives B T E numbers of its own tokens, where a gathered table is V E.
    """
    if axis_size("fsdp") * axis_size("tensor") == 1:
        return jnp.take(table.astype(dtype), index, axis=0)
    rows = dividing(index.shape[0], BATCH)
    tokens = P(rows, dividing(index.shape[1], "seq"))
    local = functools.partial(_look_up_shards, rows_are_cut=rows is not None, dtype=dtype)
    return over_shards(local, (table, index), (P(None, ("fsdp", "tensor")), tokens), tokens)


def _look_up_shards(table: Array, index: Array, *, rows_are_cut: bool, dtype: DTypeLike) -> Array:
    table = table.astype(dtype)
    if rows_are_cut:
        found = jnp.take(table, jax.lax.all_gather(index, "fsdp"), axis=0)  # of all rows, [fsdp, B, T, columns]
        found = jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=0)  # of these rows
    else:
        found = jax.lax.all_gather(jnp.take(table, index, axis=0), "fsdp")
    found = jnp.moveaxis(found, 0, -2)
    found = jax.lax.all_gather(found, "tensor", axis=-2)  # [B, T, fsdp, tensor, columns]
    return found.reshape(*index.shape, -1)
