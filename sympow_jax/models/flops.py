"""Exact floating-point operations of the model, a multiply-add counting 2."""

from sympow_jax.config import Config, LayerSpec, ModelConfig
from sympow_jax.layers.kernels import linear_kernel
from sympow_jax.models.transformer import layer_runs
from sympow_jax.ops.linear_attention.kernels import Kernel
from sympow_jax.typing import PyTree


def expansion(spec: LayerSpec, model: ModelConfig) -> tuple[Kernel, int]:
    """The linear kernel of a layer, and P, the exact size of its expanded key."""
    kernel = linear_kernel(spec.attention.kernel, degree=spec.attention.degree)
    return kernel, kernel.num_features(spec.qk_head_dim(model))


def attention_flops_per_token(config: Config, seq_len: int) -> float:
    """Forward FLOPs per token of all score, weight and state products at context `seq_len`.

    Softmax and the quadratic forms: seq_len (D + Dv) per head, the causal half of two products (a window of W tokens:
    2 W (D + Dv)). The linear forms: 4 P (Dv + 1) per head, update and query of the state with its normaliser.
    """
    m, total = config.model, 0.0
    for spec, depth in layer_runs(config):
        if spec.mixer != "attention":
            continue
        if spec.attention.is_linear_form:
            per_head = 4 * expansion(spec, m)[1] * (m.head_dim + 1)
        else:
            seen = seq_len if spec.window is None else min(2 * spec.window, seq_len)
            per_head = seen * (spec.qk_head_dim(m) + m.head_dim)
        total += depth * m.num_heads * per_head
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
