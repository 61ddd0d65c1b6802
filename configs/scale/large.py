"""Decoders of 1.3, 7 and 14 billion parameters with a vocabulary of 128,256: SIZE,CONTEXT[,VARIANT].

    python train.py --config=configs/scale/large.py:7b,65536 --workdir=DIR \
        --config.data.train=STORE --config.data.heldout=STORE

| size | layers | width | heads | of keys | MLP | parameters |
|---|---|---|---|---|---|---|
| 1.3b | 24 | 2,048 | 16 of 128 | 4 | 5,632 | 1.3e9, one table for embedding and output |
| 7b | 32 | 4,096 | 32 of 128 | 8 | 11,008 | 6.7e9 |
| 14b | 40 | 5,120 | 40 of 128 | 8 | 17,408 | 14.5e9 |

Grouped queries, SwiGLU, RMSNorm, norms of queries and keys; 4,194,304 tokens a step at every context. The mesh has one
sequence along fsdp for each of the batch and cuts it over the devices that are left: 65,536 tokens on 256 devices are
fsdp 64 x seq 4, 1,048,576 are fsdp 4 x seq 64. Nothing of these sizes was trained here: shapes are those of open models
(Llama 3, arXiv 2407.21783; Qwen 3, arXiv 2505.09388), the rest is unverified. What compilers say of them, and for which
of them that is known: docs/plans. Before renting anything: docs/planning.md.
"""

from ml_collections import ConfigDict

from configs import default

TOKENS_PER_STEP = 4_194_304
SIZES = {  # layers, width, heads, heads of keys, MLP, one table
    "1.3b": (24, 2_048, 16, 4, 5_632, True),
    "7b": (32, 4_096, 32, 8, 11_008, False),
    "14b": (40, 5_120, 40, 8, 17_408, False),
}


def get_config(arg: str = "1.3b,65536") -> ConfigDict:
    """SIZE,CONTEXT[,VARIANT] with SIZE 1.3b, 7b or 14b."""
    size, context, variant = (*arg.split(","), "", "")[:3]
    if not context.isdigit():
        raise ValueError(f"no context in {arg!r}; write SIZE,CONTEXT[,VARIANT], such as 7b,65536")
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    c = default.get_config(variant or "conformal_sympow")
    m = c.model
    m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.mlp_dim, m.tied_embeddings = SIZES[size]
    m.head_dim = 128
    m.mlp = "swiglu"
    m.norm = "rmsnorm"
    m.embedding_norm = False
    m.vocab_size = 128_256
    m.dtype = "bfloat16"
    m.remat = "block"
    m.loss_block = 2_048  # 1 GiB of logits on a device
    c.attention.qk_norm = True
    c.position.base = 500_000.0
    c.data.train = "corpus/train"
    c.data.heldout = "corpus/heldout"
    c.data.seq_len = int(context)
    c.data.batch_size = max(TOKENS_PER_STEP // c.data.seq_len, 1)
    c.mesh.data = 1
    c.mesh.fsdp = c.data.batch_size
    c.mesh.seq = -1
    c.num_train_steps = 25_000
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 2_000
    c.evaluation.every_steps = 1_000
    c.evaluation.lengths = (1_024, 4_096, 16_384, 65_536)
    c.evaluation.chunk_size = 4_096
    c.checkpoint.every_steps = 500
    return c
