"""Cases of softmax attention: the same list feeds the tests and the benchmarks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.ops import positions
from sympow_jax.ops.positions.position_bias import PositionBias


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """Sizes and options of one call; `gates` names the heads they are for, `cache` the extra keys; biases add up."""

    name: str
    B: int = 2
    T: int = 37
    H: int = 4
    K: int = 2
    D: int = 16
    Dv: int = 8
    gates: str | None = None
    gate_shift: float = 2.0
    bias: tuple[str, ...] = ()
    window: int | None = None
    packed: bool = False
    cache: int = 0
    sinks: bool = False


ARG_SPECS = (
    ArgSpec("one_token", T=1, gates="kv"),
    ArgSpec("plain", T=32, K=4),
    ArgSpec("gates_per_kv_head", gates="kv"),
    ArgSpec("strong_gates_window", gates="query", gate_shift=-5.0, window=9),
    ArgSpec("packed", packed=True, gates="query"),
    ArgSpec("packed_window_fire", packed=True, window=9, bias=("fire",)),
    ArgSpec("all_biases", H=6, bias=("alibi", "kerple_log", "kerple_power", "t5", "sandwich", "fire")),
    ArgSpec("gates_window_t5", gates="kv", window=20, bias=("t5",)),
    ArgSpec("cache_fire", T=20, cache=26, gates="kv", bias=("fire",)),
    ArgSpec("cache_window", T=20, cache=26, gates="query", window=9),
    ArgSpec("sinks_packed", packed=True, gates="query", sinks=True),
    ArgSpec("sinks_cache_window", T=20, cache=26, window=9, bias=("fire",), sinks=True),
)


def make_args(spec: ArgSpec, dtype=jnp.float32, seed: int = 0) -> tuple[dict, dict]:
    """Returns the arguments that have gradients (arrays, and params of the bias under "bias") and the options."""
    rng = np.random.default_rng(seed)
    B, T, S = spec.B, spec.T, spec.T + spec.cache
    heads = {None: 0, "kv": spec.K, "query": spec.H}[spec.gates]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays: dict[str, Any] = {
        "q": normal(B, T, spec.H, spec.D),
        "k": normal(B, S, spec.K, spec.D),
        "v": normal(B, S, spec.K, spec.Dv),
    }
    if heads:
        logits = jnp.asarray(rng.normal(size=(B, S, heads)) + spec.gate_shift, jnp.float32)
        arrays["log_gates"] = jax.nn.log_sigmoid(logits)
    if spec.sinks:
        arrays["sinks"] = jnp.asarray(rng.normal(size=spec.H), jnp.float32)
    options: dict[str, Any] = {"window": spec.window}
    if spec.bias:
        biases = {kind: make_bias(kind, spec.H) for kind in spec.bias}
        arrays["bias"] = PositionBias(biases, _sum) if len(biases) > 1 else biases[spec.bias[0]]
    if spec.packed:
        options["segment_ids"], options["positions"] = _packed(B, T)
    if spec.cache:
        options["positions"], options["key_positions"] = _cache(B, T, spec.cache)
    return arrays, options


def make_bias(kind: str, num_heads: int) -> PositionBias:
    """The bias of a kind with its initial parameters."""
    if kind == "alibi":
        return positions.alibi_bias(jnp.asarray(positions.alibi_slopes(num_heads), jnp.float32))
    if kind == "sandwich":
        return positions.sandwich_bias(num_heads)
    return positions.learned_bias(kind, positions.init_bias(kind, jax.random.key(1), num_heads))


def _sum(biases, q_positions, k_positions):
    return functools.reduce(jnp.add, [bias(q_positions, k_positions) for bias in biases.values()])


def _packed(B, T):
    """Two documents and trailing padding in the first row, three documents in the others."""
    starts, ids = np.zeros((B, T), np.int32), np.ones((B, T), np.int32)
    for b, cuts in enumerate([(T // 3, T - 4)] + [(T // 4, T // 2)] * (B - 1)):
        for n, cut in enumerate(cuts):
            starts[b, cut:], ids[b, cut:] = cut, n + 2
    ids[0, T - 4 :] = 0
    return jnp.asarray(ids), jnp.asarray(np.arange(T, dtype=np.int32)[None] - starts)


def _cache(B, T, cache):
    """Row b holds b empty slots (-1), all written tokens, the queries' own last, and 3 unwritten slots."""
    written = [T + cache - b - 3 for b in range(B)]
    queries = np.stack([np.arange(n - T, n) for n in written])
    later = [np.full(3, 1000 * (b % 2) - 1) for b in range(B)]
    keys = np.stack([np.concatenate([-np.ones(b), np.arange(written[b]), later[b]]) for b in range(B)])
    return jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32)
