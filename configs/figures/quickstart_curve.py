"""The figure of README.md: loss at one to eight times the training context, of the quickstart model.

    python train.py --config=configs/figures/quickstart_curve.py:VARIANT --workdir=runs/VARIANT
    python eval.py --workdir=runs/VARIANT

VARIANT conformal_sympow, softmax_rope, sympow. Budget: 800 steps of 4 x 512 bytes, 3.6 minutes on two idle CPU cores;
the Python sources of the machine; 48 held-out documents of 32 files.
Paper: none at this scale. The conformal article (Manifest AI 2024) finds the same order at 124M parameters: plain
sympow and softmax lose beyond their training context, the gated forms do not (conformal_contextwise.py).
Found (RESULTS.md), same-target loss at 512 and 4,096, nats a byte: conformal_sympow 1.591 and 1.591, softmax_rope 1.680
and 3.228, sympow 1.954 and 3.069.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """`configs/quickstart.py`, unchanged."""
    return quickstart.get_config(variant)
