"""Recall against bytes of state: the figure of Zoology (arXiv 2312.04927) and Based (arXiv 2402.18668) with ours on it.

    python -m benchmarks.study state_recall      (what of the sweep below is missing; RESULTS.md)
    python -m sympow_jax.sweep --config=configs/figures/state_recall.py --root=runs/state_recall \
        --points=all --seeds=0,1,2
    python train.py --config=configs/figures/state_recall.py:POINT --workdir=DIR        (POINT sympow_p2,head_dim=8)

Two layers of width 64, a short convolution and then the kernel, no MLP; 64 tokens, all of them 16 pairs and their
queries, of a vocabulary of 512. A point is a family at one size of its state: head_dim of two heads, feature_dim, or
the window. Softmax's state is its cache at 64 tokens. 30 points, 3 seeds each.
Budget: 3,000 steps of 64 x 64 tokens, 1 to 3 minutes a run on one CPU core: 1.5 hours on two.
Paper, read from Based's Figure 2, +-0.02: full attention 1.00; Based 0.54 at 5.8 kB of state, 0.71 at 11.6 kB, 0.82
at 23 kB, 0.97 to 0.99 from 81 kB on; sliding windows 0.07 at 8 kB, 0.51 at 64 kB, 0.80 at 256 kB, 1.00 at 1 MB.
Found (RESULTS.md): sympow of degree 2 0.54 at 3.1 kB and 0.99 at 19 kB, of degree 4 0.81 at 24 kB, conformal_sympow as
degree 2, Based 0.45 at 4.5 kB and 0.95 at 12 kB, ReBased 0.43 at 3.2 kB and 0.94 at 10 kB, softmax 0.63 at 4.9 kB and
1.00 at 9 kB, windows nothing before 17 kB (0.60).
"""

from ml_collections import ConfigDict

from configs.figures import mqar_zoology

FAMILIES = {  # variant, what it is besides, and its sizes
    "softmax_rope": ("softmax_rope", {}, "head_dim", (4, 8, 16, 32)),
    "fox": ("fox", {}, "head_dim", (4, 8, 16, 32)),
    "window": ("softmax_rope", {"layer_pattern": ("short_conv", "window")}, "window", (4, 8, 16, 32)),
    "sympow_p2": ("sympow", {"degree": 2}, "head_dim", (4, 8, 16, 32)),
    "sympow_p4": ("sympow", {"degree": 4}, "head_dim", (4, 8, 12)),
    "conformal_sympow": ("conformal_sympow", {}, "head_dim", (4, 8, 16, 32)),
    "based": ("based", {}, "feature_dim", (4, 8, 16, 24)),
    "rebased": ("rebased", {}, "feature_dim", (4, 8, 16)),
}
POINTS = tuple(f"{name},{key}={size}" for name, (_, _, key, sizes) in FAMILIES.items() for size in sizes)


def get_config(point: str = "sympow_p2,head_dim=8") -> ConfigDict:
    """FAMILY,KEY=SIZE, one of POINTS or a size between them."""
    family, _, setting = point.partition(",")
    if family not in FAMILIES or setting.partition("=")[0] != FAMILIES[family][2] or not setting.partition("=")[2]:
        raise ValueError(f"{point!r}: a point is FAMILY,KEY=SIZE, as {', '.join(POINTS[::4])}")
    variant, besides, key, _ = FAMILIES[family]
    c = mqar_zoology.get_config(variant)
    c.attention.update(besides)
    part = c.model if key == "head_dim" else c.attention
    part[key] = int(setting.partition("=")[2])
    c.task.num_pairs = 16
    c.evaluation.every_steps = 0
    c.evaluation.lengths = (64,)
    c.logging.tensorboard = False
    return c
