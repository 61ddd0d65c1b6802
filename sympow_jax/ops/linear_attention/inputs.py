"""Arguments of the linear kernels: checks, and the one grouped layout that every form works in."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sympow_jax.ops.gates import finite_log_gates
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.ops.platform import target_platform
from sympow_jax.ops.positions.position_bias import PositionBias
from sympow_jax.typing import Array, Bool, Float, Int, PyTree, accumulation_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """The past of a row, as much of it as its next token can see; its size does not depend on the context.

    state      = sum_j exp(G_T - G_j) phi(k_j) v_j^T   (keys unscaled: `scale` belongs to the queries)
    normalizer = sum_j exp(G_T - G_j) phi(k_j)

    Attributes:
      state: [B, K, P, Dv], float32, P the number of features of the kernel.
      normalizer: [B, K, P], float32.
      segment_id: [B], the document that the state belongs to; only a next token of the same document sees it.
    """

    state: PyTree  # JAX rebuilds pytrees with stacked layers, shapes or shardings in the fields
    normalizer: PyTree
    segment_id: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearInputs:
    """What every form of linear attention takes; G = H / K queries share a key.

    `runs` numbers the documents of a row, 0 continuing the initial state; tokens that are not `valid` are padding.
    `bias`, of `positions`, is for the quadratic forms alone.
    """

    q: Float[Array, "B T K G D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K Dv"]
    log_gates: Float[Array, "B T K *D"]
    runs: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    bias: PositionBias | None = None
    positions: Int[Array, "B T"] | None = None

    @property
    def has_vector_gates(self) -> bool:
        """Whether the gates are one a dim, [B, T, K, D], and act inside the scores."""
        return self.log_gates.ndim == 4


def group_inputs(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    *,
    log_gates: Float[Array, "B T K *D"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float | None,
    state: LinearState | None,
    bias: PositionBias | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> LinearInputs:
    """Scales and groups the queries, clips the gates, and numbers the runs of segment ids."""
    B, T, H, D = q.shape
    K = k.shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    dtype = accumulation_dtype(q, k, v)
    q = (q.astype(dtype) * jnp.asarray(scale, dtype)).astype(q.dtype).reshape(B, T, K, H // K, D)
    if log_gates is None:
        # behind a barrier: XLA would add the zeros up at compile time, for minutes
        gates = jax.lax.optimization_barrier(jnp.zeros((B, T, K), dtype))
    else:
        gates = finite_log_gates(log_gates.astype(dtype))
    runs, valid = number_runs(segment_ids, None if state is None else state.segment_id, (B, T))
    if bias is not None and positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return LinearInputs(q, k, v, gates, runs, valid, bias, positions)


def number_runs(
    segment_ids: Int[Array, "B T"] | None, state_segment: Int[Array, "B"] | None, shape: tuple[int, int]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The run of each token (0 until the first change of segment id, then 1, 2, ...), and which are not padding."""
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    first = segment_ids[:, :1] if state_segment is None else state_segment[:, None]
    previous = jnp.concatenate([first, segment_ids[:, :-1]], axis=1)
    return jnp.cumsum(segment_ids != previous, axis=1, dtype=jnp.int32), segment_ids != 0


def extend_values(v: Float[Array, "B T K Dv"], valid: Bool[Array, "B T"]) -> Float[Array, "B T K Dv1"]:
    """[v, 1] for real tokens and 0 for padding: the normaliser is one more value."""
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    return jnp.where(valid[..., None, None], jnp.concatenate([v, ones], axis=-1), 0.0)


def normalise(extended: Array, *, axis: int) -> Array:
    """num / den of [num, den] along an axis; 0, with gradient 0, in rows whose weights sum to 0."""
    num, den = jnp.split(extended, [extended.shape[axis] - 1], axis=axis)
    present = den != 0.0
    return jnp.where(present, _ratio(num, jnp.where(present, den, 1.0)), 0.0)


@jax.custom_jvp
def _ratio(num: Array, den: Array) -> Array:
    """num / den, whose derivative holds no 1 / den^2: of weights as small as s^4, that is not a float32."""
    return num / den


@_ratio.defjvp
def _ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (_, den), (dnum, dden) = primals, tangents
    out = _ratio(*primals)
    if den.shape == (*out.shape[:-1], 1) and target_platform() == "cpu":
        # As a product of rows, so that the gradient of den is one: XLA's CPU adds up such rows 8 times slower.
        return out, (dnum - jnp.einsum("...d,...->...d", out, dden[..., 0], precision="highest")) / den
    return out, (dnum - out * dden) / den


def pad_time(inputs: LinearInputs, multiple: int) -> LinearInputs:
    """Appends padding tokens, which change no state, until T is a multiple."""
    extra = -inputs.k.shape[1] % multiple
    if not extra:
        return inputs

    def pad(x, **mode):
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), **mode)

    padded = jax.tree.map(pad, dataclasses.replace(inputs, bias=None))
    return dataclasses.replace(padded, bias=inputs.bias, runs=pad(inputs.runs, mode="edge"))


def check_arguments(
    kernel: Kernel, q, k, v, *, log_gates, segment_ids, positions, bias, state, chunk_size, with_state=False
) -> None:
    """Raises one line that names the argument, its value and what is legal."""
    B, T, H, D = q.shape
    K, Dv = k.shape[2], v.shape[3]
    if H % K:
        raise ValueError(f"k has {K} heads, which does not divide the {H} heads of q; use a divisor of {H}")
    expected: dict[str, tuple[int, ...]] = {"k": (B, T, K, D), "v": (B, T, K, Dv)}
    actual: dict[str, tuple[int, ...]] = {"k": k.shape, "v": v.shape}
    if log_gates is not None:
        vector = log_gates.ndim == 4
        expected["log_gates"], actual["log_gates"] = (B, T, K, D) if vector else (B, T, K), log_gates.shape
    for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
        if ids is not None:
            expected[name], actual[name] = (B, T), ids.shape
    if state is not None:
        P = kernel.num_features(D)
        expected["initial_state.state"], actual["initial_state.state"] = (B, K, P, Dv), state.state.shape
    for name, shape in expected.items():
        if actual[name] != shape:
            raise ValueError(f"{name} has shape {tuple(actual[name])}; with q {q.shape} it must be {shape}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not a length; use None or an integer >= 1")
    if bias is not None and (with_state or state is not None):
        raise ValueError("bias needs the positions of past keys, which a state does not keep; drop bias or the state")
