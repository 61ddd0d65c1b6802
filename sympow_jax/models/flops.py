"""Exact floating-point operations of the model, a multiply-add counting 2."""

from sympow_jax.config import Config
from sympow_jax.layers.kernels import linear_kernel
from sympow_jax.layers.projections import qk_head_dim
from sympow_jax.models.transformer import layer_runs
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import PyTree


def expansion(config: Config) -> tuple[Kernel, int]:
    """The config's linear kernel, and P, the exact size of its expanded key."""
    a = config.attention
    kernel = linear_kernel(a.kernel, degree=a.degree)
    return kernel, kernel.num_features(qk_head_dim("attention", config.model, a))


def attention_flops_per_token(config: Config, seq_len: int) -> float:
    """Forward FLOPs per token of all score, weight and state products at context `seq_len`.

    Softmax and the quadratic forms: seq_len (D + Dv) per head, the causal half of two products (a window of W tokens:
    2 W (D + Dv)). The linear forms: 4 P (Dv + 1) per head, update and query of the state with its normaliser.
    """
    m, a = config.model, config.attention
    total = 0.0
    for kind, depth in layer_runs(config):
        if kind == "attention" and a.is_linear and a.is_linear_form:
            total += depth * m.num_heads * 4 * expansion(config)[1] * (m.head_dim + 1)
        elif kind == "attention":
            total += depth * m.num_heads * seq_len * (qk_head_dim(kind, m, a) + m.head_dim)
        elif kind == "window":
            total += depth * m.num_heads * min(2 * a.window, seq_len) * 2 * m.head_dim
    return total


def matrix_parameters(config: Config, params: PyTree) -> int:
    """Parameters that each token multiplies: all matrices, the tied embedding once (as output), no lookups."""
    tables = ["position_embedding"] if config.model.tied_embeddings else ["position_embedding", "embedding"]
    return sum(_matrix_size(tree) for name, tree in params.items() if name not in tables)


def _matrix_size(tree: PyTree, name: str = "") -> int:
    if isinstance(tree, dict):
        return sum(_matrix_size(child, key) for key, child in tree.items())
    return tree.size if name in ("kernel", "embedding", "output") else 0


def train_flops_per_token(config: Config, params: PyTree, seq_len: int) -> tuple[float, float]:
    """(attention, everything else) of a training step, forward and backward: three times the forward."""
    return 3 * attention_flops_per_token(config, seq_len), 6.0 * matrix_parameters(config, params)
