"""Loss of sympow relative to softmax by degree: "Symmetric Power Transformers" (Manifest AI, August 2024).

    python train.py --config=configs/figures/sympow_relative_loss.py:VARIANT[,DEGREE] --workdir=DIR \
        --config.data.train=gs://BUCKET/train.zarr --config.data.heldout=gs://BUCKET/heldout.zarr

VARIANT,DEGREE: softmax_rope, sympow,2, sympow,4, sympow,6. Budget: 100,000 steps of 128 x 4,096 GPT-2 tokens of
LongCrawl64, 52 billion tokens a run (8 H100 in the article); a trial on any store: --config.num_train_steps=100.
Paper, training loss at the end (mean of the last ten logged points) and relative to softmax: softmax 2.384; p = 2
2.470, 1.03; p = 4 2.354, 0.98; p = 6 2.324, 0.97. State in bfloat16: 39 MB, 14 GB, 2.2 TB.
Found: not run.
"""

from ml_collections import ConfigDict

from configs import lc64_124m


def get_config(arg: str = "sympow,2") -> ConfigDict:
    """VARIANT[,DEGREE] at context 4,096."""
    variant, _, degree = arg.partition(",")
    c = lc64_124m.get_config(f"{variant},4096")
    c.attention.degree = int(degree or 2)
    return c
