"""Keys that travel around a ring of devices: outputs and all gradients are those of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sympow_jax import ops, sharding
from sympow_jax.layers import sequence_parallel
from sympow_jax.layers.context import Context
from sympow_jax.layers.tokens import Tokens
from sympow_jax.ops.softmax_attention.arg_specs import ArgSpec, make_args
from tests.tolerances import assert_close

MORE = (pytest.mark.slow, pytest.mark.quick)
T, SCALE = 48, 0.3
CASES = {
    "small": ArgSpec(
        "small", B=2, T=24, H=2, K=1, D=4, Dv=4, gates="query", bias=("kerple_log",), packed=True, window=21, sinks=True
    ),
    "plain": ArgSpec("plain", T=T),
    "fox_packed": ArgSpec("fox_packed", T=T, gates="query", packed=True),
    "strong_gates_window": ArgSpec("strong_gates_window", T=T, gates="kv", gate_shift=-5.0, window=29),
    "t5_kerple_gates": ArgSpec("t5_kerple_gates", T=T, gates="query", bias=("t5", "kerple_log")),
    "power_fire_packed": ArgSpec("power_fire_packed", T=T, gates="kv", packed=True, bias=("fire",)),
    "power_t5": ArgSpec("power_t5", T=T, bias=("t5",)),
    "t5_gates": ArgSpec("t5_gates", T=T, gates="query", bias=("t5",)),
    "t5_window": ArgSpec("t5_window", T=T, gates="query", bias=("t5",), window=9),
    "fire_narrow_window": ArgSpec("fire_narrow_window", T=T, packed=True, window=7, bias=("fire",), sinks=True),
    "fire_packed_window": ArgSpec("fire_packed_window", T=T, packed=True, window=31, bias=("fire",)),
}


def mesh_of(seq):
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "seq": seq})


def on_shards(seq, arrays, options, kernel, window):
    """`attend_ring` on a mesh, or `attend_window` where the window is within a shard, as in a layer."""
    ring, more = ops.softmax_attention_ring, {"window": window}
    if kernel:
        ring, more = functools.partial(ops.linear_attention_ring, kernel), {}

    def attend(tokens, bias, segment_ids, positions, sinks):
        context = Context(jnp.int32(0), positions, segment_ids, None, 0)
        own = {} if kernel else {"sinks": sinks}
        if window is not None and window <= tokens.q.shape[1]:
            tokens = dataclasses.replace(tokens, sinks=sinks)
            context = dataclasses.replace(context, offset=jax.lax.axis_index("seq") * tokens.q.shape[1])
            blocks = {"implementation": "blockwise", "block_size": 4}
            return sequence_parallel.attend_window(tokens, bias, context, window=window, scale=SCALE, **blocks)
        return sequence_parallel.attend_ring(ring, tokens, bias, context, scale=SCALE, block_size=4, **more, **own)

    tokens = Tokens(arrays["q"], arrays["k"], arrays["v"], None, arrays.get("log_gates"))
    known = [options.get(name) for name in ("segment_ids", "positions")]
    cut = P(None, "seq")
    with sharding.use_mesh(mesh_of(seq)):
        return sharding.over_shards(
            attend, (tokens, arrays.get("bias"), *known, arrays.get("sinks")), (cut, P(), cut, cut, P()), cut
        )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_gradients(seq, arrays, options, kernel, window, cotangent):
    def loss(arrays):
        if seq == 1 and kernel:
            out = ops.linear_attention(kernel, **arrays, **options, scale=SCALE, implementation="reference")
        elif seq == 1:
            out = ops.softmax_attention(**arrays, **options, scale=SCALE, window=window, implementation="reference")
        else:
            out = on_shards(seq, arrays, options, kernel, window)
        return (out.astype(cotangent.dtype) * cotangent).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, gradients


@pytest.mark.parametrize(
    ("case", "seq"),
    [
        ("small", 2),
        *(
            pytest.param(case, seq, marks=MORE)
            for case, seq in (
                ("plain", 2),
                ("fox_packed", 8),
                ("strong_gates_window", 4),
                ("t5_kerple_gates", 2),
                ("fire_packed_window", 4),
                ("t5_window", 4),
                ("fire_narrow_window", 2),
                ("power_fire_packed", 4),
                ("power_t5", 2),
                ("t5_gates", 4),
            )
        ),
    ],
)
def test_a_ring_gives_the_outputs_and_gradients_of_one_device(case, seq):
    arrays, options = make_args(CASES[case])
    window, kernel = options.pop("window"), ops.PowerKernel(2) if "power" in case else None
    cotangent = jnp.asarray(
        np.random.default_rng(1).normal(size=(*arrays["q"].shape[:3], arrays["v"].shape[3])), jnp.float32
    )
    want = value_and_gradients(1, arrays, options, kernel, window, cotangent)
    there = jax.device_put((arrays, options, cotangent), sharding.everywhere(mesh_of(seq)))
    got = value_and_gradients(seq, *there[:2], kernel, window, there[2])
    scale = np.linalg.norm(want[1]["v"])
    kind = "strong" if "strong" in case else "mild"
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert_close(np.asarray(a), np.asarray(b), "float32", kind, name=jax.tree_util.keystr(path), scale=scale)


@pytest.mark.parametrize("ways", ["ring", "gathered", "window"])
def test_a_bias_of_distance_is_looked_up_once_for_each(ways):
    """Not for each pair: on 65,536 tokens of a TPU that is a thousand times the memory traffic."""
    arrays, _ = make_args(CASES["power_t5"])
    tokens = Tokens(arrays["q"], arrays["k"], arrays["v"], None, None)
    blocks, columns = {"implementation": "blockwise", "block_size": 6}, (T // 2 + 6 if ways == "window" else T) + 12

    def attend(tokens, bias):
        context = Context(jnp.int32(0), None, None, None, 0)
        if ways == "ring":
            return sequence_parallel.attend_ring(ops.softmax_attention_ring, tokens, bias, context, block_size=6)
        if ways == "window":
            return sequence_parallel.attend_window(tokens, bias, context, window=6, **blocks)
        return sequence_parallel.attend_gathered(tokens, bias, context, **blocks)

    with sharding.use_mesh(mesh_of(2)):
        cut = P(None, "seq")
        program = str(
            jax.make_jaxpr(lambda *x: sharding.over_shards(attend, x, (cut, P()), cut))(tokens, arrays["bias"])
        )
    shapes = {found.strip("[]") for found in re.findall(r"f32(\[[0-9,]*\]) = gather", program)}
    assert shapes == {f"{arrays['q'].shape[2]},{columns}"}, shapes
