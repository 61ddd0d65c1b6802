"""The 125M configuration of the Forgetting Transformer paper (arXiv 2503.02130) on LongCrawl64.

    python train.py --config=configs/fox_125m.py:fox --workdir=DIR --config.data.train=... --config.data.heldout=...

12 layers of 768, 12 heads of 64, context 16,384, 524,288 tokens a step, AdamW (0.9, 0.95), weight decay 0.1, clip 1,
warm-up over 256 Mi tokens, cosine to 0 over 2.68 billion tokens, learning rate 2e-3, bfloat16; RMSNorm and SwiGLU as
in LLaMA. FoX-Pro adds QK-norm, a norm of each head's output and an output gate: --config.attention.qk_norm=true
--config.attention.output_norm=true --config.attention.output_gate=true (its token shift is not implemented; its MLP has
ratio 3.5). RoPE baselines use base 500,000.
Budget by `python -m sympow_jax.plan --config=configs/fox_125m.py:fox --topology=h100:8` (jax 0.10.2, XLA's form; it
ran nowhere): 0.314 s a step at best, bound by memory, 29.9% MFU, 18.7 GiB a device: 3.6 H100-hours for all steps.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "fox") -> ConfigDict:
    """`variant` is fox, or a baseline beside it."""
    c = default.get_config(variant)
    c.num_train_steps = 5_112  # 2.68e9 tokens
    c.model.mlp = "swiglu"
    c.model.mlp_dim = 2_048  # unverified: 8/3 of the width
    c.model.norm = "rmsnorm"
    c.model.embedding_norm = False
    c.model.tied_embeddings = False  # unverified
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"
    c.attention.chunk_size = 1_024
    c.position.base = 500_000.0
    c.data.train = "longcrawl64/train.zarr"
    c.data.heldout = "longcrawl64/heldout.zarr"
    c.data.seq_len = 16_384
    c.data.batch_size = 32
    c.data.missing_chunks = "exclude"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 512
    c.optimizer.final_fraction = 0.0
    c.evaluation.lengths = (1_024, 4_096, 16_384, 65_536)
    c.evaluation.chunk_size = 4_096
    return c
