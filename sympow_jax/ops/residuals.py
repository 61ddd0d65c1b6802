"""The names of what a backward pass needs of its forward pass, which a remat policy may keep."""

from jax.ad_checkpoint import checkpoint_name

from sympow_jax.typing import PyTree

ATTENTION = "attention"
PROJECTION = "projection"  # outputs of products that a policy does not see, inside a gradient of their own


def kept(tree: PyTree) -> PyTree:
    """`tree` with every array named: outputs, normalisers and chunk states, not the inputs."""
    return checkpoint_name(tree, ATTENTION)
