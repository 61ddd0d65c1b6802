"""Multi-query associative recall of two-layer models: Figure 2 of Zoology (arXiv 2312.04927) at the scale of a CPU.

    python train.py --config=configs/figures/mqar_zoology.py:VARIANT --workdir=runs/mqar/VARIANT
    python eval.py --workdir=runs/mqar/VARIANT --lengths=64,128,256 --pairs=8,16,32

VARIANT softmax_rope, conformal_sympow, based, rebased. Budget: 2,000 steps of 64 x 64 tokens.
Paper: 64 to 256 tokens with 4 to 16 pairs of a vocabulary of 8,192, zero filler, width 64 to 512, 100,000 examples
for 64 epochs, best of four learning rates: attention solves every setting.
Found: not run.
"""

from ml_collections import ConfigDict

from configs import default

HYBRIDS = ("based", "rebased")


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """Two layers of `variant`; Based and ReBased follow one convolution layer, as in their papers."""
    c = default.get_config(variant or "conformal_sympow")
    c.num_train_steps = 2_000
    c.model.num_layers = 2
    c.model.embed_dim = 64
    c.model.num_heads = 2
    c.model.head_dim = 32
    c.model.mlp = "none"
    c.model.embedding_norm = False
    c.model.scan_layers = False
    if c.variant in HYBRIDS:
        c.attention.layer_pattern = ("short_conv", "attention")
    c.data.train = c.data.heldout = "mqar"
    c.data.seq_len = 64
    c.data.batch_size = 64
    c.task.vocab_size = 512
    c.task.num_pairs = 8
    c.task.random_filler = False
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.b2 = 0.98
    c.evaluation.every_steps = 200
    c.evaluation.num_batches = 8
    c.evaluation.lengths = (64, 128, 256)
    c.checkpoint.every_steps = 500
    c.logging.every_steps = 50
    return c
