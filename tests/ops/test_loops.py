import jax
import jax.numpy as jnp
import pytest

from sympow_jax import ops
from sympow_jax.ops.loops import causal_pairs


def test_pairs_of_tiles():
    assert causal_pairs(4, 4, 128) == 1 + 2 + 3 + 4
    assert causal_pairs(2, 8, 128) == 2 * 4.5  # two of eight shards' tiles, balanced
    assert causal_pairs(512, 512, 128, window=64) == 512 * 2
    # the first query of a tile sees back 128 keys through a window of 129, one tile; and into two through one of 130
    assert [causal_pairs(8, 8, 128, window=window) for window in (129, 130)] == [8 * 2, 8 * 3]


@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_programs_name_the_trips_of_their_loops(gradient):
    x = jnp.ones((1, 1024, 1, 8))

    def attend(x):
        return jnp.sum(ops.softmax_attention(x, x, x, implementation="blockwise", block_size=128))

    function = jax.grad(attend) if gradient else attend
    assert "trips_4.5/while" in jax.jit(function).lower(x).compile().as_text()
