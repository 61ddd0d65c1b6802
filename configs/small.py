"""Sizes between the quickstart and GPT-2 small, on any store: SIZE[,VARIANT].

    python train.py --config=configs/small.py:12m,conformal_sympow --workdir=DIR

| size | layers | width | heads | context | tokens a step |
|---|---|---|---|---|---|
| 3m  | 4 | 256 | 4 of 64 | 1,024 | 16,384 |
| 12m | 6 | 384 | 6 of 64 | 2,048 | 65,536 |
| 30m | 8 | 512 | 8 of 64 | 4,096 | 131,072 |
"""

from ml_collections import ConfigDict

from configs import default

SIZES = {"3m": (4, 256, 1_024, 16), "12m": (6, 384, 2_048, 32), "30m": (8, 512, 4_096, 32)}


def get_config(arg: str = "3m") -> ConfigDict:
    """SIZE[,VARIANT] with SIZE 3m, 12m or 30m."""
    size, _, variant = arg.partition(",")
    if size not in SIZES:
        raise ValueError(f"--config=configs/small.py:{arg}: size {size!r} is not one of {', '.join(SIZES)}")
    c = default.get_config(variant or "conformal_sympow")
    c.model.num_layers, c.model.embed_dim, c.data.seq_len, c.data.batch_size = SIZES[size]
    c.model.num_heads = c.model.embed_dim // 64
    c.model.head_dim = 64
    c.model.mlp_dim = 4 * c.model.embed_dim
    c.num_train_steps = 5_000
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 200
    c.evaluation.lengths = tuple(c.data.seq_len * factor for factor in (1, 2, 4, 8))
    return c
