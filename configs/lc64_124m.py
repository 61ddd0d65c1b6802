"""The GPT-2-small recipe of the sympow articles on LongCrawl64; every variant, any context.

    python train.py --config=configs/lc64_124m.py:conformal_sympow,65536 --workdir=DIR \
        --config.data.train=gs://BUCKET/train.zarr --config.data.heldout=gs://BUCKET/heldout.zarr

The argument is VARIANT[,CONTEXT]. From Manifest AI 2024 (Symmetric Power Transformers; Improving Symmetric Power
Transformers with Conformal Transformations): 12 layers of 768, 12 heads of 64, rotary positions, an extra LayerNorm
after the embeddings, 524,288 tokens a step at every context, bfloat16 compute, Adam at 6e-4 without a schedule,
100,000 updates; degrees 2 and 4 (--config.attention.degree=4). What those articles leave open, or what was not checked
against them, is marked "unverified" below; so is the gate's start at 0.999, which is that of their released code.
Data: data/README.md.

Cost, device-hours of 100,000 steps at 65,536 tokens that no run can beat, by docs/plans (`python -m sympow_jax.plan
--config=configs/lc64_124m.py:VARIANT,65536 --topology=TOPOLOGY`; nothing ran there): TPU v5e:4x4, conformal_sympow 118
with the fused kernels (lc64_124m_64k_v5e_kernels.json) and 273 without, sympow 324, based 67, softmax_rope and fox 474,
sympow of degree 4 531; h100:8 in XLA's forms, conformal_sympow 200, sympow 196, based 36, softmax_rope 1,543, fox
1,715, degree 4 2,079. Other contexts are not planned.
At an eighth of its width, context and rows, on any machine: --config.reduce=8 --config.num_train_steps=20
--config.data.train=python-stdlib --config.data.heldout=python-stdlib
"""

from ml_collections import ConfigDict

from configs import default

TOKENS_PER_STEP = 524_288


def get_config(arg: str = "conformal_sympow,4096") -> ConfigDict:
    """VARIANT[,CONTEXT]."""
    variant, _, context = arg.partition(",")
    c = default.get_config(variant)
    c.num_train_steps = 100_000
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"  # on v5e 11.0 of 15.75 GiB and 61% MFU at best; "block": 4.9 GiB, 51% (docs/plans)
    c.attention.chunk_size = 256  # on TPUs the features of 256 tokens stay in VMEM: docs/plans
    c.position.base = 10_000.0  # unverified; the authors' own convention: --config.position.convention=manifest
    c.data.train = "longcrawl64/train.zarr"
    c.data.heldout = "longcrawl64/heldout.zarr"
    c.data.seq_len = int(context or 4_096)
    c.data.batch_size = max(TOKENS_PER_STEP // c.data.seq_len, 1)
    c.data.missing_chunks = "exclude"  # the public mirror is partial
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 6e-4  # unverified at contexts other than 4,096
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.b1 = 0.9  # unverified: optax's and PyTorch's default
    c.optimizer.b2 = 0.999  # unverified, likewise
    c.optimizer.weight_decay = 0.0  # unverified
    c.optimizer.clip_norm = 0.0  # unverified
    c.evaluation.every_steps = 1_000
    c.evaluation.lengths = (1_024, 4_096, 16_384, 65_536)
    c.evaluation.chunk_size = 4_096
    c.checkpoint.every_steps = 1_000
    return c
