"""Recall against state size: Figure 2 of Based (arXiv 2402.18668) at the scale of a CPU.

    python train.py --config=configs/figures/mqar_based.py:VARIANT[,FEATURE_DIM] --workdir=runs/mqar_based/NAME
    python eval.py --workdir=runs/mqar_based/NAME --lengths=64,128,256 --pairs=4,8,16,32

VARIANT based (feature_dim 8, 16, 24), softmax_rope, conformal_sympow, rebased; the report draws accuracy and state.
Budget: 3,000 steps of 64 x 64 tokens, as mqar_zoology.py; random filler, as Based's configurations leave it.
Paper: vocabulary 8,192, 100,000 examples of 64 tokens with 4 pairs and 20,000 each of 128 to 256 tokens with 8 to 64,
32 epochs, tested up to 1,024 tokens with 256 pairs. Read from its figure, +-0.02: full attention 1.00; Based 0.54 at
5.8 kB of state, 0.71 at 11.6 kB, 0.82 at 23 kB, 0.89 at 40 kB, 0.97 to 0.99 from 81 kB on; sliding windows 0.07 at
8 kB, 0.51 at 64 kB, 0.80 at 256 kB, 1.00 at 1 MB; Mamba 0.57 at 8 kB, about 0.9 at 256 kB.
Found: not run.
"""

from ml_collections import ConfigDict

from configs.figures import mqar_zoology


def get_config(arg: str = "based,16") -> ConfigDict:
    """VARIANT[,FEATURE_DIM]; feature_dim belongs to based and rebased."""
    variant, _, feature_dim = arg.partition(",")
    c = mqar_zoology.get_config(variant)
    c.attention.feature_dim = int(feature_dim or 16)
    c.task.random_filler = True
    return c
