"""Rows of a table that is cut over devices: the same numbers, and the table nowhere whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import sharding

V, E, T = 51, 16, 8


@pytest.mark.parametrize(
    ("sizes", "rows"), [((2, 2, 2, 1), 8), ((1, 4, 1, 2), 8), ((1, 2, 2, 2), 1)], ids=["tensor", "seq", "one row"]
)
def test_rows_of_a_cut_table_and_its_gradient_equal_those_of_a_whole_one(sizes, rows):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    table, weights = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(V, E), (rows, T, E)]))
    index = jax.random.randint(jax.random.key(2), (rows, T), 0, V)

    def loss(table):
        found = sharding.look_up(table, index, jnp.float32)
        return jnp.sum(weights * found**2), found

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected, found = gradient(table)
    np.testing.assert_array_equal(found, table[index])
    where = sharding.tree_shardings({"embedding": {"embedding": table}}, mesh)["embedding"]["embedding"]
    with sharding.use_mesh(mesh):
        program = gradient.lower(jax.device_put(table, where)).compile()
        got, found = program(jax.device_put(table, where))
    np.testing.assert_array_equal(found, table[index])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert f"[{V},{E}]" not in program.as_text(), "no device holds the whole table or its gradient"
