"""Running one specification of a linear kernel: values, final state and all gradients, by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax import ops
from sympow_jax.ops.linear_attention.specs import ArgSpec

CHUNK_SIZE = 16


def attention_with_state(spec: ArgSpec, state, arguments: dict, **options):
    """The public function of the specification's kernel."""
    if spec.degree:
        return ops.power_attention_with_state(**arguments, degree=spec.degree, initial_state=state, **options)
    return ops.taylor_attention_with_state(**arguments, initial_state=state, **options)


def state_from(spec: ArgSpec, arrays: dict):
    """The initial state among the arrays, or None."""
    if "state" not in arrays:
        return None
    return ops.LinearState(arrays["state"], arrays["normalizer"], jnp.ones(spec.B, jnp.int32))


def all_arrays(spec: ArgSpec) -> tuple[dict, dict]:
    """Inputs, with an initial state that some keys could have left, and cotangents of out and of the final state."""
    arrays = spec.inputs()
    rng = np.random.default_rng(1)
    P = jax.eval_shape(lambda: _zeros(spec)).state.shape[2]
    cotangents = {
        "out": rng.normal(size=(spec.B, spec.T, spec.H, spec.Dv)),
        "state": rng.normal(size=(spec.B, spec.K, P, spec.Dv)),
        "normalizer": rng.normal(size=(spec.B, spec.K, P)),
    }
    if spec.initial_state:
        arrays |= _state_of_some_keys(dataclasses.replace(spec, H=spec.K, T=8, gates="none", segments=False))
    return arrays, {name: x.astype(np.float32).astype(np.float64) for name, x in cotangents.items()}


@functools.cache
def _state_of_some_keys(spec: ArgSpec) -> dict:
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, spec.inputs(seed=2))
        run = jax.jit(lambda inputs: attention_with_state(spec, None, inputs, implementation="reference")[1])
        left = run(inputs)
        return {"state": np.asarray(left.state), "normalizer": np.asarray(left.normalizer)}


def _zeros(spec: ArgSpec):
    kernel = ops.PowerKernel(spec.degree) if spec.degree else ops.TaylorKernel()
    return ops.empty_state(kernel, spec.B, spec.K, spec.D, spec.Dv)


def evaluate(spec: ArgSpec, implementation: str, dtype: str, **options) -> dict[str, np.ndarray]:
    """out, the final state and the gradients of every float input, computed in one jitted program."""
    arrays, cotangents = all_arrays(spec)
    with jax.enable_x64(dtype == "float64"):
        cast = {n: jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for n, x in arrays.items()}
        segment_ids = {n: cast.pop(n) for n in ("segment_ids",) if n in cast}
        weights = {n: jnp.asarray(x, dtype) for n, x in cotangents.items()}

        def loss(floats):
            arguments = {n: x for n, x in floats.items() if n not in ("state", "normalizer")} | segment_ids
            options_ = {"implementation": implementation, "chunk_size": CHUNK_SIZE} | options
            out, final = attention_with_state(spec, state_from(spec, floats), arguments, **options_)
            values = {"out": out, "state": final.state, "normalizer": final.normalizer}
            return sum(jnp.sum(values[n] * weights[n].astype(values[n].dtype)) for n in values), values

        (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast)
        results = {f"final {n}" if n != "out" else n: np.asarray(x) for n, x in values.items()}
        return results | {f"grad {n}": np.asarray(x) for n, x in gradients.items()}
