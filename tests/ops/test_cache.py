"""The cache of a softmax layer against attention over the whole sequence."""

import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax import ops
from sympow_jax.ops import cache as cache_lib


@pytest.mark.parametrize("length", [20, 24])
def test_blocks_that_overlap_count_every_slot_once(length, monkeypatch, rng):
    """Blocks of 8 slots: of 20 slots the last block begins at 12, in the one before; of 24 at 16, in none."""
    monkeypatch.setattr(cache_lib, "BLOCK_SIZE", 8)
    B, H, K, D = 2, 4, 2, 8
    q, k, v = (jnp.asarray(rng.normal(size=(B, length, n, D)), jnp.float32) for n in (H, K, K))
    gates = jnp.asarray(-rng.uniform(size=(B, length, H)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (B, length))
    whole = ops.softmax_attention(q, k, v, log_gates=gates, implementation="reference")
    cache = cache_lib.empty_cache(B, K, length, D, D, gate_heads=H, dtype="float32")
    for start, stop in ((0, 7), (7, 17), (17, length)):
        part, offset = slice(start, stop), jnp.int32(start)
        at = positions[:, part]
        cache = cache_lib.append(cache, k[:, part], v[:, part], log_gates=gates[:, part], positions=at, offset=offset)
        out = cache_lib.cached_attention(q[:, part], cache, positions=at, offset=offset, scale=D**-0.5)
        np.testing.assert_allclose(out, whole[:, part], rtol=1e-5, atol=1e-6)
