"""Every variant trained at 256 tokens and evaluated to 2,048: the sweep of RESULTS.md and of docs/report_*.png.

    python -m sympow_jax.sweep --config=configs/figures/variants_sweep.py --root=runs/sweep \
        --variants=softmax_rope:0+1,conformal_sympow:0+1,fox:0+1,sympow:0+1,softmax_alibi:0+1,softmax_fire:0+1,all
    python -m sympow_jax.report runs/sweep/* --output=report.html

Budget: 300 steps of 8 x 256 bytes a run, 0.6 million tokens, two to four minutes on two CPU cores.
Paper: FIRE (arXiv 2310.04418) and KERPLE (arXiv 2205.09921) compare the biases at the scale of language models; their
tables are not repeated here, since nothing converges in this budget.
Found: RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """The quickstart model at half its context."""
    c = quickstart.at_default_rate(variant)
    c.data.seq_len = 256
    c.data.batch_size = 8
    c.num_train_steps = 300
    c.evaluation.every_steps = 0
    c.evaluation.num_documents = 32
    c.evaluation.lengths = (256, 512, 1_024, 2_048)
    return c
