"""The table of named variants: one row is one architecture of the length-generalisation literature.

Every row is a choice along three axes, kernel x position x gate, of the one attention formula

    weight(i, j) = kernel(q_i . k_j) exp(bias(i, j)) prod_{m=j+1..i} gate_m
    out_i        = sum_{j<=i} weight(i, j) v_j / sum_{j<=i} weight(i, j),

where a vector gate has a number for each rotary plane or dim, inside the score, sum_d q_id k_jd prod_m gate_md, and a
layer pattern, repeated over the depth, for the hybrids; a pattern may name other rows, which stand for their
attention layer. Configs refer to rows by name; adding a variant is adding a row here.
"""

import dataclasses

KERNELS = ("softmax", "power", "taylor", "rebased")
LINEAR_KERNELS = ("power", "taylor", "rebased")
ROTARY_POSITIONS = ("rope", "learned_rope")
BIAS_POSITIONS = ("alibi", "kerple_log", "kerple_power", "t5", "sandwich", "fire", "fire_shared")
LEARNED_BIASES = ("kerple_log", "kerple_power", "t5", "fire")  # a set of parameters in each layer
ABSOLUTE_POSITIONS = ("learned_absolute", "sinusoidal")
POSITIONS = ("none", *ROTARY_POSITIONS, *BIAS_POSITIONS, *ABSOLUTE_POSITIONS)
ROTATIONS = ("scalar", "frequency")  # of learned_rope: one beta a head, or one a head and frequency
GATES = ("none", "fixed", "learned", "data", "vector")
GATE_INITS = ("zero", "long", "timescales")
CONVOLUTIONS = ("gated_conv", "short_conv")
BLENDABLE = ("softmax_rope", "softmax_nope")  # rows whose layers have no parameters beyond query, key, value and out
LAYER_KINDS = ("attention", "window", *CONVOLUTIONS)  # a layer pattern names kinds, and rows of the table


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: kernel, position, gate, where it comes from, rotation, initial gate and layer pattern."""

    name: str
    kernel: str
    position: str
    gate: str
    source: str
    rotation: str = "scalar"
    gate_init: str = "long"
    layer_pattern: tuple[str, ...] = ("attention",)


_ROWS = (
    Variant("softmax_nope", "softmax", "none", "none", "Haviv et al. 2022; Kazemnejad et al. 2023"),
    Variant("softmax_rope", "softmax", "rope", "none", "Su et al. 2021, arXiv 2104.09864"),
    Variant("softmax_alibi", "softmax", "alibi", "none", "Press et al. 2022, arXiv 2108.12409"),
    Variant("softmax_kerple_log", "softmax", "kerple_log", "none", "Chi et al. 2022, arXiv 2205.09921"),
    Variant("softmax_kerple_power", "softmax", "kerple_power", "none", "Chi et al. 2022, arXiv 2205.09921"),
    Variant("softmax_t5", "softmax", "t5", "none", "Raffel et al. 2020, arXiv 1910.10683"),
    Variant("softmax_sandwich", "softmax", "sandwich", "none", "Chi et al. 2023, arXiv 2212.10356"),
    Variant("softmax_fire", "softmax", "fire", "none", "Li et al. 2024, arXiv 2310.04418"),
    Variant("softmax_fire_shared", "softmax", "fire_shared", "none", "Li et al. 2024 (FIRE-S)"),
    Variant("softmax_absolute", "softmax", "learned_absolute", "none", "Radford et al. 2019 (GPT-2)"),
    Variant("fox", "softmax", "none", "data", "Lin et al. 2025, arXiv 2503.02130", gate_init="zero"),
    Variant("sympow", "power", "rope", "none", "Manifest AI 2024, Symmetric Power Transformers"),
    Variant("sympow_gated", "power", "rope", "data", "Kumar et al. 2025, arXiv 2503.03269"),
    Variant("conformal_sympow", "power", "learned_rope", "data", "Kumar et al. 2025, arXiv 2503.03269"),
    Variant(
        "conformal_vector_sympow",
        "power",
        "learned_rope",
        "vector",
        "conformal_sympow with a complex number for each plane: gates as of GLA's dims (arXiv 2312.06635), and steps",
        rotation="frequency",
    ),
    Variant("conformal_softmax", "softmax", "learned_rope", "data", "softmax with the conformal position and gate"),
    Variant(
        "selective_rope",
        "softmax",
        "learned_rope",
        "none",
        "Movahedi et al. 2025, arXiv 2511.17388, with steps of each frequency within (0, 2)",
        rotation="frequency",
    ),
    Variant(
        "based",
        "taylor",
        "none",
        "none",
        "Arora et al. 2024, arXiv 2402.18668",
        layer_pattern=("gated_conv", "attention", "window", "gated_conv", "gated_conv"),
    ),
    Variant(
        "rebased",
        "rebased",
        "none",
        "none",
        "Aksenov et al. 2024, arXiv 2402.10644",
        layer_pattern=("short_conv", "attention"),
    ),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}

_COSTS = {  # per token and layer, multiply-adds of the scores and values, and numbers that decoding keeps
    "softmax": ("H T (D + Dv) / 2", "K T (D + Dv)"),
    "power": ("2 H P (Dv + 1)", "K P (Dv + 1)"),
    "taylor": ("2 H P (Dv + 1)", "K P (Dv + 1)"),
    "rebased": ("2 H P (Dv + 1)", "K P (Dv + 1)"),
}


def position_name(position: str, rotation: str) -> str:
    """`learned_rope`, or `learned_rope (frequency)` where every frequency has steps of its own."""
    return f"{position} (frequency)" if rotation == "frequency" else position


def markdown_table() -> str:
    """The table of README.md, made from the rows."""
    lines = [
        "| variant | kernel | position | gate | cost at context T | state | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in VARIANTS.values():
        cost, state = _COSTS[row.kernel]
        others = sorted({*row.layer_pattern} - {"attention"})
        kernel = row.kernel + (f" (with {', '.join(others)})" if others else "")
        cells = (f"`{row.name}`", kernel, position_name(row.position, row.rotation), row.gate, cost, state, row.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
