"""The cache of a softmax layer against attention over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import ops
from sympow_jax.ops import cache as cache_lib


def test_blocks_that_overlap_count_every_slot_once(monkeypatch, rng):
    """Blocks of 8 slots: of 20 the last block begins at 12, inside the one before."""
    monkeypatch.setattr(cache_lib, "BLOCK_SIZE", 8)
    B, T, H, K, D = 2, 20, 4, 2, 8
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (H, K, K))
    gates, sinks = jnp.asarray(-rng.uniform(size=(B, T, H)), jnp.float32), jnp.asarray([0.5, -3.0, 2.0, 0.0])
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    @jax.jit
    def both_halves():
        cache = cache_lib.empty_cache(B, K, T, D, D, gate_heads=H, dtype="float32")
        outs = []
        for part in (slice(0, 10), slice(10, 20)):
            at, offset = positions[:, part], jnp.int32(part.start)
            cache = cache_lib.append(
                cache, k[:, part], v[:, part], log_gates=gates[:, part], positions=at, offset=offset
            )
            options = {"positions": at, "offset": offset, "scale": D**-0.5, "sinks": sinks}
            outs.append(cache_lib.cached_attention(q[:, part], cache, **options))
        options = {"log_gates": gates, "sinks": sinks, "implementation": "reference"}
        return jnp.concatenate(outs, 1), ops.softmax_attention(q, k, v, **options)

    np.testing.assert_allclose(*both_halves(), rtol=1e-5, atol=1e-6)
