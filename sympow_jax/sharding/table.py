"""The one table: which mesh axes cut the dims of an array, by the path of its name.

It holds for parameters, for optimizer state (whose paths end in those of the parameters), and for the parameters
of a position bias where attention runs on shards. Vectors of embed_dim (norms, biases) stay whole: they are
thousands of times smaller than the matrices beside them.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sympow_jax.sharding.mesh import BATCH
from sympow_jax.typing import PyTree

_BOTH = ("fsdp", "tensor")
_TABLE = (  # the end of a path, the axes of its dims
    (r"(position_)?embedding/embedding", (None, _BOTH)),  # [V, E]: any vocabulary size; see `look_up`
    (r"output", (_BOTH, None)),  # [E, V]
    (r"(query|key|value|output_gate|beta|gate|up|input|multiplier)/kernel", ("fsdp", "tensor")),  # [E, out]
    (r"(out|down)/kernel", ("tensor", "fsdp")),  # [in, E]
    (r"beta_down/kernel", ("fsdp", None)),  # [E, R]
    (r"beta_up/kernel", (None, "tensor")),  # [R, K F]
    (r"(query|key|value|up|gate|input)/bias", ("tensor",)),
    (r"mixer/kernel", (None, "tensor")),  # [W, F], the taps of a convolution
    (r"(table|kernel_out)", (None, "tensor")),  # [..., H], position biases
    (r"(p|a|slopes|strengths|bias_out|gate_logits|log_length_scale|sinks)", ("tensor",)),  # [H]
    (r"(scale|bias|c|threshold|kernel_in|bias_in|frequencies|ns_coeffs)", ()),
)
_STACKED = re.compile(r"(^|/)blocks_\d+/")  # a leading dim of layers, which are scanned


def spec(path: str, ndim: int) -> P:
    """The mesh axes of each dim of the array named `path`; scalars, as counters are, stay whole."""
    if ndim == 0:
        return P()
    stacked = (None,) if _STACKED.search(path) else ()
    for pattern, axes in _TABLE:
        if re.search(rf"(^|/){pattern}$", path):
            return P(*stacked, *axes)
    raise ValueError(f"{path}: no row of the table in sympow_jax/sharding/table.py matches; add one")


def tree_specs(tree: PyTree) -> PyTree:
    """`spec` of every leaf of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec(_name(path), leaf.ndim), tree)


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Where every leaf of a tree of arrays or ShapeDtypeStructs lives: parameters, optax's state, a train state.

    Raises:
      ValueError: a path that the table does not know, or a dim that its axes do not divide.
    """

    def place(path, leaf):
        sharding = NamedSharding(mesh, _shortest(spec(_name(path), leaf.ndim), mesh))
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            raise ValueError(
                f"{_name(path)}: its shape {leaf.shape} is not divided by the mesh axes {sharding.spec} of sizes "
                f"{dict(mesh.shape)}; use axes that divide it"
            ) from None
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree)


def named_shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda axes: NamedSharding(mesh, _shortest(axes, mesh)), specs, is_leaf=_is_spec)


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs of a tree of arrays or shapes, placed."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _is_spec(leaf: PyTree) -> bool:
    return isinstance(leaf, P)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the [B, T] arrays of a batch live: rows over data and fsdp, time over seq."""
    return NamedSharding(mesh, _shortest(P(BATCH, "seq"), mesh))


def _shortest(axes: P, mesh: Mesh) -> P:
    """The same layout without axes of one device, as compiled programs report it: equal layouts compare equal."""
    names = [name if isinstance(name, tuple) else (name,) for name in axes]
    kept = [tuple(n for n in name if n is not None and mesh.shape[n] > 1) for name in names]
    while kept and not kept[-1]:
        kept.pop()
    return P(*(name[0] if len(name) == 1 else name or None for name in kept))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
