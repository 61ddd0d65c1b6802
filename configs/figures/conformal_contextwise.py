"""Loss by position far beyond the training context: the conformal sympow article (Manifest AI 2024, arXiv 2503.03269).

    python train.py --config=configs/figures/conformal_contextwise.py:VARIANT --workdir=DIR \
        --config.data.train=gs://BUCKET/train.zarr --config.data.heldout=gs://BUCKET/heldout.zarr
    python eval.py --workdir=DIR --lengths=16384,65536
    python -m sympow_jax.report DIR [DIR ...] --output=report.html        (draws the published curves behind)

VARIANT softmax_rope, sympow, sympow_gated, conformal_sympow, all of degree 4. Budget: 100,000 steps of 32 x 16,384
GPT-2 tokens of LongCrawl64, 52 billion tokens a run. Training writes the loss by position to metrics.jsonl.
Paper, nats a token, means over positions 2k-8k, 14.7k-16.4k, 16.4k-20k, 24k-32k, 60k-65k: softmax 2.361, 2.360, 2.379,
2.487, 2.759; sympow 2.265, 2.284, 2.865, 5.515, 7.135; with gates 2.288, 2.292, 2.283, 2.279, 2.295; conformal
2.203, 2.177, 2.169, 2.167, 2.175.
Found: not run; the same order at the scale of a CPU is in quickstart_curve.py.
"""

from ml_collections import ConfigDict

from configs import lc64_124m


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """`variant` at degree 4, trained at 16,384."""
    c = lc64_124m.get_config(f"{variant},16384")
    c.attention.degree = 4
    c.evaluation.every_steps = 5_000
    c.evaluation.contextwise_length = 65_536
    c.evaluation.lengths = (16_384, 65_536)
    return c
