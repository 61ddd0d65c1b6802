"""A small model of any variant on the Python sources of this machine; minutes on two CPU cores.

    python train.py --config=configs/quickstart.py:conformal_sympow --workdir=runs/quickstart

4 layers of width 128, byte tokens, context 512.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """The model of `make quickstart`."""
    c = at_default_rate(variant)
    c.optimizer.learning_rate = 5e-3
    return c


def at_default_rate(variant: str) -> ConfigDict:
    """The same at the rate of configs/default.py, which studies under configs/figures were run at."""
    c = default.get_config(variant or "conformal_sympow")
    c.num_train_steps = 800
    c.evaluation.every_steps = 200
    c.checkpoint.every_steps = 200
    c.model.num_layers = 4
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.head_dim = 32
    c.model.mlp_dim = 512
    return c


def of_a_study(variant: str) -> ConfigDict:
    """That for one of many runs that are compared: evaluated once trained, to 16 times the trained context."""
    c = at_default_rate(variant)
    c.evaluation.every_steps = 0
    c.evaluation.lengths = (64, 512, 2_048, 8_192)
    c.evaluation.num_documents = 24
    c.checkpoint.every_steps = 400
    c.logging.tensorboard = False
    return c
