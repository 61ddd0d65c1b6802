"""Per-token loss to four times the training context: the Forgetting Transformer (arXiv 2503.02130), Figure 2.

    python train.py --config=configs/figures/fox_per_token_loss.py:VARIANT --workdir=DIR \
        --config.data.train=gs://BUCKET/train.zarr --config.data.heldout=gs://BUCKET/heldout.zarr
    python eval.py --workdir=DIR --lengths=16384,32768,65536 --num_documents=32768

VARIANT fox, softmax_rope (base 500,000). Budget: 5,112 steps of 32 x 16,384 GPT-2 tokens of LongCrawl64, 2.68 billion
tokens, the paper's 125M runs; its figure is of 760M parameters and 48.3 billion tokens.
Paper: loss L(i) over 2 Gi held-out tokens, smoothed over 101, and perplexity P(l) = exp(mean of L below l), between
1.47 and 1.67 nats and 4.4 and 5.5 at 760M; FoX keeps falling to the end, the RoPE transformer turns up past 16,384.
The values of single lengths are in figures only. P(l) is exp of `lengths` in eval/length_generalisation.json.
Found: not run.
"""

from ml_collections import ConfigDict

from configs import fox_125m


def get_config(variant: str = "fox") -> ConfigDict:
    """`configs/fox_125m.py`, with the loss by position during training."""
    c = fox_125m.get_config(variant)
    c.evaluation.every_steps = 1_000
    c.evaluation.contextwise_length = 65_536
    c.evaluation.lengths = (16_384, 32_768, 65_536)
    return c
