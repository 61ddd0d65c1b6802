"""The figure of README.md: loss at a 16th to eight times the training context, of the quickstart model.

    python -m sympow_jax.sweep --config=configs/figures/quickstart_curve.py --root=runs/quickstart_curve \
        --variants=conformal_sympow,softmax_rope,sympow
    python train.py --config=configs/figures/quickstart_curve.py:VARIANT --workdir=runs/VARIANT
    python eval.py --workdir=runs/VARIANT

Budget: 800 steps of 4 x 512 bytes, 3 minutes a variant on two idle CPU cores; the Python sources of the machine; 48
held-out documents of 32 files.
Paper: none at this scale. The conformal article (Manifest AI 2024) finds the same order at 124M parameters: plain
sympow and softmax lose beyond their training context, the gated forms do not (conformal_contextwise.py).
Found (RESULTS.md), same-target loss at 32, 512 and 4,096, nats a byte: conformal_sympow 1.615, 1.577 and 1.577,
softmax_rope 1.632, 1.594 and 3.510, sympow 1.925, 1.935 and 2.770.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """`configs/quickstart.py`, unchanged."""
    return quickstart.get_config(variant)
