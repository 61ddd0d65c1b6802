"""What context parallelism costs, from the compiled program: collectives a layer, and bytes a device."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from sympow_jax import sharding
from sympow_jax.models.model import Model
from sympow_jax.sharding import exchange
from tests.models.small import VOCAB, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def compiled(seq: int, length: int, *, gradient: bool):
    """A program of four layers scanned, so that each collective inside the loop is one a layer."""
    flags = ("model.num_layers=4", f"data.seq_len={length}", "attention.implementation=chunked", "data.batch_size=1")
    config = tiny_config("conformal_sympow", *flags, "attention.chunk_size=64", "model.loss_block=64")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "seq": seq})
    model = Model(config, VOCAB, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(place, params, sharding.tree_shardings(params, mesh))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    loss = lambda params, tokens: jnp.mean(model.nll(params, tokens, tokens)[0])  # noqa: E731
    return jax.jit(jax.grad(loss) if gradient else loss).lower(params, tokens).compile()


def collectives(program) -> collections.Counter:
    names = "all-gather|reduce-scatter|collective-permute|all-to-all"
    return collections.Counter(re.findall(rf"= \S+ ({names})(?:-start)?\(", program.as_text()))


def test_a_layer_exchanges_its_totals_and_its_state_once_each_way(monkeypatch):
    """PERFORMANCE: the prefix of the gates and phases, and that of the states; one gather each or log2(P) steps."""
    assert collectives(compiled(8, 1024, gradient=False)) == {"all-gather": 2}
    assert collectives(compiled(8, 1024, gradient=True)) == {"all-gather": 2, "reduce-scatter": 2}
    monkeypatch.setattr(exchange, "SMALL_GATHER", 0)
    assert collectives(compiled(8, 1024, gradient=False)) == {"all-gather": 1, "collective-permute": 3}


def test_memory_of_a_long_sequence_falls_with_the_number_of_shards():
    one, eight = (compiled(seq, 32_768, gradient=True).memory_analysis() for seq in (1, 8))
    assert one is not None and eight is not None
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 6
