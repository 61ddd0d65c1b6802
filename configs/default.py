"""Every key of a run, with its type, default and meaning; other configs start from here and change values.

    python train.py --config=configs/default.py:VARIANT --workdir=DIR [--config.a.b=value ...]

Values are never None: "variant" means "what the variant's row says", "auto" and 0 mean "chosen for you", as the
comment beside them says. The resolved values of a run are written to its config.json.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "conformal_sympow") -> ConfigDict:
    """The GPT-2-small shape on the default corpus; `variant` is a row of sympow_jax/variants.py."""
    c = ConfigDict()
    c.variant = variant
    c.seed = 0  # parameters, data order and evaluation draws all derive from it
    c.num_train_steps = 1_000  # optimizer steps; training is bounded by steps, never by the clock
    c.model = _model()
    c.attention = _attention()
    c.position = _position()
    c.data = _data()
    c.task = _task()  # of data.train = mqar | copy | parity | ... (docs/evaluation.md), and of eval.py --task
    c.mesh = _mesh()  # devices along each axis; one of them may be -1: what the others leave
    c.optimizer = _optimizer()
    c.training = _training()
    c.evaluation = _evaluation()
    c.checkpoint = _checkpoint()
    c.logging = _logging()
    return c


def _model() -> ConfigDict:
    m = ConfigDict()
    m.num_layers = 12
    m.embed_dim = 768
    m.num_heads = 12
    m.num_kv_heads = 0  # 0 = num_heads; otherwise it divides num_heads (grouped queries)
    m.head_dim = 64
    m.mlp_dim = 3072
    m.mlp = "gelu"  # gelu (by tanh) | gelu_exact (by erf) | swiglu | geglu (gelu gates) | none
    m.mlp_bias = "auto"  # auto (all without a gate, none with one) | none | all
    m.norm = "layernorm"  # layernorm | rmsnorm
    m.norm_eps = 1e-5  # added to the variance, or the mean square
    m.norm_placement = "pre"  # pre | post | sandwich: norms before a sublayer, on its output, or both (layers/block.py)
    m.parallel_residual = False  # mixer and MLP read the same stream, each through its norm, and are added together
    m.vocab_size = 0  # rows of the embedding and logits; 0 = the tokenizer's; surplus ones are never sampled
    m.embedding_scale = 1.0  # multiplies token embeddings; rounded to dtype
    m.residual_scale = 1.0  # multiplies what every mixer and MLP adds to the stream
    m.logit_scale = 1.0  # multiplies logits
    m.logit_softcap = 0.0  # c: logits become c tanh(logits / c), in the loss too; 0 = no cap
    m.embedding_norm = True  # an extra norm after the input embeddings (Manifest AI 2024)
    m.tied_embeddings = True
    m.init_std = 0.02  # normal(0, init_std); projections into the residual stream are divided by sqrt(2 num_layers)
    m.dtype = "float32"  # compute dtype of matrix products: float32 | bfloat16; parameters stay float32
    m.scan_layers = True  # one compiled layer body for a run of equal layers; False unrolls (same parameters)
    m.remat = "none"  # none | dots | attention | block | offload: what layers keep for backward (models/remat.py)
    m.loss_block = 8_192  # tokens whose logits exist at once
    return m


def _attention() -> ConfigDict:
    a = ConfigDict()
    a.kernel = "variant"  # variant | softmax | power | taylor | rebased
    a.position = "variant"  # variant | none | rope | learned_rope | alibi | kerple_log | kerple_power | t5 | ...
    # vector (linear kernels): one number a rotary plane, the same on its two dims, or one a dim without rotation
    a.gate = "variant"  # variant | none | fixed | learned | data | vector
    a.gate_init = "variant"  # variant | zero (gate 1/2) | long (gate 0.999) | timescales (log-spaced per head)
    a.gate_min_timescale = 16.0  # tokens; the shortest of gate_init = timescales, and of gate = fixed
    a.gate_max_timescale = 4_096.0  # tokens; the longest
    a.degree = 2  # p of the power kernel: 2, 4 or 6
    a.feature_dim = 16  # head_dim of q and k under taylor and rebased
    a.rebased_norm = "head"  # head | concatenated: the span of ReBased's LayerNorm
    a.scale = 0.0  # multiplies q . k; 0 = 1 / sqrt(head_dim)
    a.bias = "none"  # none | qkv | all: biases of query, key and value, or of out as well
    a.qk_norm = False  # RMSNorm of queries and keys
    a.qk_norm_span = "head"  # head | concatenated: over each head, or over all heads at once
    a.qk_norm_eps = 1e-6  # added to the mean square
    a.output_gate = False  # sigmoid(W x) on the attention output, as FoX-Pro has
    a.output_norm = False  # RMSNorm of each head's output, before the gate
    a.log_length_scale = False  # softmax: scores times s log(keys that the query sees), s learned per head
    a.sinks = False  # softmax: a learned logit of each head in the denominator, exp(0) at first
    a.window = 64  # tokens that a `window` layer (sliding-window softmax) sees
    a.conv_width = 3  # taps of the convolution layers
    a.conv_expand = 2  # `gated_conv` projects to this many times embed_dim: half is convolved, half gates it
    a.layer_pattern = ("variant",)  # repeated over the depth: attention | window | gated_conv | short_conv | a variant
    a.blend_from = "none"  # none | softmax_rope | softmax_nope: the attention that this one grows out of in training
    a.blend_steps = 0  # steps in which the outputs of blend_from fade, their share going from 1 to 0; 0 = none
    a.implementation = "auto"  # auto | reference | blockwise | chunked | recurrent | pallas; auto is resolved once
    a.chunk_size = 0  # chunk length of linear kernels; 0 = measured default
    return a


def _position() -> ConfigDict:
    p = ConfigDict()
    # betas of learned_rope, of all its layers: one a kv head, or one a kv head and frequency, by a low-rank projection
    p.rotation = "variant"  # variant (what the row of each layer says) | scalar | frequency
    p.rotation_rank = 16  # of the projection to the betas of every frequency
    p.base = 10_000.0  # rope: frequencies are base^(-2i/D)
    p.window_base = 0.0  # the base of `window` layers, which are then never scaled; 0 = as the other layers
    p.rotary_fraction = 1.0  # share of the dims of a head, the first ones, that is rotated
    p.convention = "standard"  # standard | manifest: frequencies 2 pi / max_length^(2i/D)
    p.scaling = "none"  # none | linear | ntk | dynamic_ntk | yarn | llama3
    p.factor = 1.0  # how many times longer than original_length the scaling reaches
    p.original_length = 0  # tokens; 0 = data.seq_len
    p.beta_fast = 32.0  # yarn: pairs that turn more often than this within original_length are kept
    p.beta_slow = 1.0  # yarn: pairs that turn less often are interpolated, those between in part
    p.truncate = True  # yarn: these bounds are rounded to whole pairs
    p.attention_factor = 0.0  # yarn: multiplies rotated q and k; 0 = m(mscale) / m(mscale_all_dim)
    p.mscale = 1.0  # yarn: x of m(x) = 0.1 x ln(factor) + 1
    p.mscale_all_dim = 0.0  # yarn: likewise
    p.low_freq_factor = 1.0  # llama3: pairs that turn less often than this within original_length are interpolated
    p.high_freq_factor = 4.0  # llama3: pairs that turn more often are kept
    p.max_length = 0  # tokens: rows of the learned_absolute table, N of the manifest convention; 0 = longest evaluated
    p.alibi_slope_scale = 1.0  # multiplies ALiBi's slopes
    return p


def _data() -> ConfigDict:
    d = ConfigDict()
    d.train = "python-stdlib"  # a corpus built in, a folder or URL of a store, a .bin, tfds:NAME, or a task
    d.heldout = "python-stdlib"  # likewise, for held-out loss and evaluation
    d.seq_len = 512
    d.batch_size = 4  # sequences in an optimizer step, over all devices and accumulation steps
    d.order = "rectangle"  # rectangle (rows first, then columns, as LongCrawl64 asks) | shuffled_chunks | stream
    d.missing_chunks = "refuse"  # refuse | exclude: rows of a partial mirror whose chunks are absent
    d.cache_bytes = 256 << 20  # bound on decoded chunks kept in memory
    d.prefetch_batches = 8
    d.num_threads = 2
    return d


def _task() -> ConfigDict:
    t = ConfigDict()
    t.vocab_size = 8_192  # of every task whose tokens are ids
    t.num_pairs = 8  # pairs, tokens to remember, keys, chains, common words, deepest stack: what the task has
    t.num_passes = 1  # mqar: how often the pairs are written
    t.power = 0.01  # mqar: a of the gaps between a pair and its query, slot r with weight r^(a - 1); 1 is uniform
    t.random_filler = True  # mqar: tokens between queries are random (Based), not 0 (Zoology, ReBased)
    t.tokenizer = "byte"  # of tasks of words: byte, gpt2:FOLDER, ..., ids (one id a word); eval.py takes the run's
    t.modulus = 5  # modular_counting
    t.num_hops = 4  # variable_tracking: assignments of a variable to a variable in a chain
    t.word_repeats = (30, 3)  # common_words: how often a common and an uncommon word stand in the list
    return t


def _mesh() -> ConfigDict:
    h = ConfigDict()
    h.data = -1  # rows of the batch
    h.fsdp = 1  # rows of the batch, with parameters and optimizer state cut as well
    h.tensor = 1  # heads and MLP features; divides num_kv_heads and mlp_dim
    h.seq = 1  # the time dim: contexts too long for one device
    h.cpu_devices = -1  # of a CPU, for train.py; -1: one a core, as far as the batch divides; config.json says how many
    return h


def _optimizer() -> ConfigDict:
    o = ConfigDict()
    o.name = "adamw"  # adamw | adam (no weight decay) | muon (matrices; everything else by adamw)
    o.learning_rate = 3e-3
    o.schedule = "cosine"  # cosine | linear | constant | wsd (warm-up, stable, decay)
    o.warmup_steps = 50  # W: step n <= W has learning_rate n / W; steps count from 1, applied or not
    o.final_fraction = 0.1  # the last step of cosine, linear and wsd has this fraction of learning_rate
    o.decay_fraction = 0.2  # wsd: share of all steps, the last ones, in which the learning rate falls
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.state_dtype = "float32"  # of the first moment: float32 | bfloat16, for 10 bytes a parameter in place of 12
    o.weight_decay = 0.1  # on matrices, embeddings and output projection: never on biases, norms or gates
    o.clip_norm = 1.0  # global gradient norm; 0 = no clipping
    o.z_loss = 0.0  # weight of mean log^2(sum exp logits), added to what is minimised; PaLM used 1e-4
    o.accumulation_steps = 1  # microbatches in a step; divides batch_size
    o.max_skipped_steps = 10  # steps in a row not applied (not finite, or outliers) before the run stops
    o.outlier_ratio = 0.0  # a gradient norm beyond this many times its running mean is not applied; 0 = no bound
    o.freeze = ("none",)  # patterns of parameters that stay as they are: layers/*/mlp/*
    o.learning_rates = ("none",)  # PATTERN=RATE: the learning_rate of the parameters of a pattern; the first that fits
    o.distill_layers = 0.0  # weight of how far layer outputs are from those of --init_from's model (docs/retrofit.md)
    o.distill_logits = 0.0  # weight of KL(its distribution of the next token || this model's)
    return o


def _training() -> ConfigDict:
    t = ConfigDict()
    t.initial_state = "zero"  # of a batch: zero | carried (from the batch before) | noise | other_document
    return t


def _evaluation() -> ConfigDict:
    e = ConfigDict()
    e.every_steps = 250  # held-out loss during training; 0 = only at the end
    e.num_batches = 16  # batches of that held-out loss, or all there are: each sequence counts once (heldout_tokens)
    e.lengths = (512, 1024, 2048, 4096)  # contexts of eval.py
    e.num_documents = 48  # held-out documents of eval.py
    e.chunk_size = 512  # tokens that eval.py streams at a time
    e.contextwise_length = 0  # at every held-out loss also the loss by position up to here, in octaves; 0 = no
    return e


def _checkpoint() -> ConfigDict:
    k = ConfigDict()
    k.every_steps = 250
    k.keep_last = 2
    k.keep_every = 0  # also keep every n-th step for ever; 0 = no
    k.keep_best = True  # also keep the step with the lowest held-out loss
    return k


def _logging() -> ConfigDict:
    g = ConfigDict()
    g.every_steps = 10  # a row of metrics.jsonl and of TensorBoard
    g.tensorboard = True
    g.wandb_project = ""  # Weights & Biases project that also gets the metrics; "" = none
    g.profile_steps = (0,)  # steps traced by the profiler into workdir/profile; 0 = none
    g.peak_flops = 0.0  # FLOP/s of one device for MFU; 0 = known accelerator, else measured by a matrix product
    return g
