"""A store with LongCrawl64's exact metadata, read, trained on and evaluated at its full length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from configs import default
from sympow_jax.config import resolve
from sympow_jax.input_pipeline import open_batches, open_store
from sympow_jax.models.registry import Model, resolve_implementation
from tests.input_pipeline.stores import random_tokens, write_store

LENGTH = 65536


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["prepare", "zarr-python"])
def test_a_store_of_longcrawl64s_layout_trains_at_its_length(tmp_path, rng, writer):
    # one whole row of chunks and a ragged one; few ids, so that the model's output layer stays small
    tokens = np.resize(random_tokens(rng, (1_000_003,)), (2051, LENGTH))
    path = tmp_path / "train.zarr"
    if writer == "prepare":
        write_store(path, tokens, chunks=(2048, 2048))
    else:
        import numcodecs

        blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE, blocksize=0)
        array = zarr.create_array(
            path, shape=tokens.shape, chunks=(2048, 2048), dtype="<u2", zarr_format=2, compressors=blosc, fill_value=0
        )
        array[:] = tokens
        array.attrs.update({"vocab_size": 257, "bos_id": 256, "tokenizer": {"kind": "byte"}})
    np.testing.assert_array_equal(zarr.open_array(path, mode="r", zarr_format=2)[2040:], tokens[2040:])
    assert open_store(str(path)).num_documents == 2051
    batches = open_batches(str(path), "train", seq_len=LENGTH, batch_size=1)
    np.testing.assert_array_equal(batches[2050]["targets"], tokens[2050:])
    c = default.get_config("conformal_sympow")
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim, c.model.num_heads, c.model.head_dim = 1, 8, 8, 1, 8
    c.data.seq_len = LENGTH
    model = Model(resolve_implementation(resolve(c)), vocab_size=257)

    @jax.jit
    def step(params, inputs, targets):
        loss, gradient = jax.value_and_grad(lambda p: model.nll(p, inputs, targets)[0].mean())(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), loss

    params = model.init(jax.random.key(0))
    losses = []
    for number in range(2):
        batch = batches[0 if number == 1 else 2050]
        params, loss = step(params, jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"]))
        losses.append(float(loss))
    assert abs(losses[0] - np.log(257)) < 0.5 and losses[1] < losses[0]
