"""A recipe at a fraction of its size, to see it run where the whole one does not fit: --config.reduce=8."""

from typing import Any

from sympow_jax.config.errors import require
from sympow_jax.config.values import check_numbers, parse_value

KEY = "reduce"
WIDTHS = ("model.embed_dim", "model.head_dim", "model.mlp_dim")
TOKENS = (
    "data.seq_len", "data.batch_size", "attention.window", "position.max_length", "position.original_length",
    "evaluation.lengths", "evaluation.contextwise_length", "evaluation.chunk_size",
)  # fmt: skip


def reduce_values(values: Any, text: str) -> None:
    """Divides widths, contexts and rows of a config by the number in `text`, in place; all else stays the recipe's.

    Depth, heads, variant, optimizer, dtype, remat and the number of steps are what they were, so the programs are
    those of the recipe at other sizes. Widths divide without rest; what else becomes 0 is 1, and 0 ("auto") stays 0.
    """
    factor = parse_value(text, 1, KEY)
    check_numbers(f"--config.{KEY}", (factor,), least=1)
    for path in WIDTHS:
        part, leaf = _place(values, path)
        hint = f"--config.{KEY} = {factor}: does not divide {path} = {part[leaf]}; use a number that divides all widths"
        require(part[leaf] % factor == 0, hint)
        part[leaf] //= factor
    for path in TOKENS:
        part, leaf = _place(values, path)
        part[leaf] = tuple(_less(x, factor) for x in part[leaf]) if leaf == "lengths" else _less(part[leaf], factor)


def _place(values: Any, path: str) -> tuple[Any, str]:
    parent, leaf = path.split(".")
    return values[parent], leaf


def _less(value: int, factor: int) -> int:
    return max(1, value // factor) if value else 0
