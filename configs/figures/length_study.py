"""All position encodings and kernels, trained at 256 tokens and evaluated from 16 to 16,384: the study of RESULTS.md.

    python -m benchmarks.study length_study      (what of the sweep below is missing; RESULTS.md)
    python -m sympow_jax.sweep --config=configs/figures/length_study.py --root=runs/length_study \
        --variants=all --seeds=0,1,2 --learning_rates=1e-3,3e-3,1e-2
    python train.py --config=configs/figures/length_study.py:VARIANT --workdir=DIR        (one run)

The corpus is python-imports, whose rows of 16,384 bytes use names that are defined far before; the same on the default
one by --config.data.train=python-stdlib --config.data.heldout=python-stdlib. The learning rate of a variant is the one
of three with the lowest held-out loss at 256 tokens (seed 0), and is that of all its seeds. A row says how far its
prefix loss at 256 is above the best where that is more than 5%.
Budget: 750 steps of 8 x 256 bytes, 1.5 million tokens, five runs a variant (three rates, two more seeds), 19
variants: 95 runs of 1 to 4 minutes on one CPU core each, and the chosen rates' three seeds are evaluated.
Paper: FIRE (arXiv 2310.04418) has FIRE before Kerple, ALiBi, T5 and RoPE on C4, trained at 2,048, tested to 8,192;
FoX (arXiv 2503.02130) and the conformal article (arXiv 2503.03269) find that data gates do not collapse; ReBased (arXiv
2402.10644) is a little better than Based.
Found (RESULTS.md): what has gates, and ALiBi, loses nothing up to 16,384 tokens, Based, Kerple and Sandwich at most
0.03 nats, ReBased 0.05; RoPE, selective_rope and sympow without a gate collapse (+1.4 to 1.7), FIRE too (+0.9 to 1.2),
whose threshold hardly left what is trained.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """The quickstart model at half its context, on text with names to recall."""
    c = quickstart.at_default_rate(variant)
    c.num_train_steps = 750
    c.data.train = c.data.heldout = "python-imports"
    c.data.seq_len = 256
    c.data.batch_size = 8
    c.evaluation.every_steps = 0
    c.evaluation.num_batches = 64
    c.evaluation.num_documents = 16
    c.evaluation.lengths = (16, 64, 256, 1_024, 4_096, 16_384)
    c.checkpoint.every_steps = 375
    c.logging.tensorboard = False
    return c
