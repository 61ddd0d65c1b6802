"""Recall at growing length: the main figure of ReBased (arXiv 2402.10644) at the scale of a CPU.

    python train.py --config=configs/figures/mqar_rebased.py:VARIANT[,LENGTH] --workdir=runs/mqar_rebased/NAME
    python eval.py --workdir=runs/mqar_rebased/NAME --lengths=LENGTH --pairs=LENGTH/4

VARIANT rebased, based, softmax_absolute; a quarter of the length in pairs, so that every even place is a query.
Budget: 3,000 steps of 4,096 tokens, as mqar_zoology.py; LENGTH 64 and 128 here, 128 to 2,048 in the paper.
Paper: vocabulary 8,192, width 64 to 512, learned absolute positions in all models, 64 epochs, five seeds, best of
four learning rates. Read from its figure, +-0.02: attention behind a convolution 1.00 everywhere; 512 tokens at width
64: Based 0.90, ReBased 0.89; 1,024 tokens at width 64: ReBased 0.55, Based 0.33, at width 128: 0.98 and 0.99; 2,048
tokens at width 128: ReBased 0.66, Based 0.49. Here the variants differ in position.
Found: not run.
"""

from ml_collections import ConfigDict

from configs.figures import mqar_zoology


def get_config(arg: str = "rebased,64") -> ConfigDict:
    """VARIANT[,LENGTH]."""
    variant, _, length = arg.partition(",")
    c = mqar_zoology.get_config(variant)
    c.data.seq_len = int(length or 64)
    c.data.batch_size = max(4_096 // c.data.seq_len, 1)
    c.task.num_pairs = c.data.seq_len // 4
    c.evaluation.lengths = (c.data.seq_len,)
    return c
