"""The attention of a trained softmax model exchanged, plainly or with a blend and distillation, beside training anew.

    python train.py --config=configs/figures/retrofit.py --workdir=runs/original
    R="--config=runs/original --init_from=runs/original --variants=sympow_gated,conformal_sympow --seeds=1,2,3
       --config.num_train_steps=200 --config.optimizer.learning_rate=1e-3 --config.optimizer.warmup_steps=20
       --config.evaluation.every_steps=25 --config.evaluation.num_documents=32"
    python -m sympow_jax.sweep $R --root=runs/swap
    python -m sympow_jax.sweep $R --root=runs/blend --config.attention.blend_steps=100 \
        --config.optimizer.distill_layers=1 --config.optimizer.distill_logits=1
    python -m sympow_jax.sweep $R --root=runs/longer --config.num_train_steps=400
    python -m sympow_jax.sweep --config=configs/quickstart.py --variants=sympow_gated,conformal_sympow --seeds=1 \
        --config.optimizer.learning_rate=0.003 --config.evaluation.every_steps=50 --root=runs/anew

heldout_loss in the metrics.jsonl of the runs is over the same held-out sequences in all of them. Budget: the original
1,000 steps of 4 x 512 bytes, eight minutes on two loaded CPU cores; a retrofit 200 steps, a blend with a teacher about
twice the work of a step; a run anew 800 steps.
Paper: LoLCATs (arXiv 2410.10254) trains linear attention on a model's softmax outputs first, then on text, at 8B
parameters and more; nothing of that size is repeated here.
Found: RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "softmax_rope") -> ConfigDict:
    """The original: the quickstart model, 1,000 steps."""
    c = quickstart.at_default_rate(variant)
    c.num_train_steps = 1_000
    return c
