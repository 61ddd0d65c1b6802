"""What the values that make up an architecture must satisfy together: model, attention and position."""

from sympow_jax import variants
from sympow_jax.config.errors import require
from sympow_jax.config.layer_specs import absolute_position, attention_specs, linear_specs, positions
from sympow_jax.config.schema import Config

MAX_LAYERS = 10_000  # a number from a damaged or foreign config.json would build layers for days
SMALLEST = 1.1754944e-38  # of the normal float32


def longest(config: Config) -> int:
    """The longest sequence that the config trains on or evaluates."""
    return max(config.data.seq_len, config.evaluation.contextwise_length, *config.evaluation.lengths)


def check_architecture(config: Config) -> None:
    """Raises ConfigError for values of an architecture that are legal alone and not together."""
    _check_model(config)
    _check_attention(config)
    _check_mixture(config)
    _check_position(config)


def _check_model(config: Config) -> None:
    m, a = config.model, config.attention
    require(m.num_layers <= MAX_LAYERS, f"model.num_layers = {m.num_layers}: at most {MAX_LAYERS:,}")
    for name, eps in (("model.norm_eps", m.norm_eps), ("attention.qk_norm_eps", a.qk_norm_eps)):
        require(eps >= SMALLEST, f"{name} = {eps}: is 0 in float32 and would divide 0 by 0; use 1e-6")
    require(
        not m.parallel_residual or (m.norm_placement == "pre" and m.mlp != "none"),
        f"model.parallel_residual = True: a mixer and an MLP read the stream through norms before them, but model.mlp "
        f"is {m.mlp!r} and model.norm_placement {m.norm_placement!r}; use an MLP and 'pre', or false",
    )
    require(
        m.mlp != "none" or m.mlp_bias == "none",
        f"model.mlp_bias = {m.mlp_bias!r}: model.mlp = 'none' has no bias; use 'auto'",
    )


def _check_attention(config: Config) -> None:
    m, a = config.model, config.attention
    require(
        m.num_heads % m.num_kv_heads == 0,
        f"model.num_kv_heads = {m.num_kv_heads}: must divide model.num_heads = {m.num_heads}",
    )
    kernels = {spec.attention.kernel for spec in attention_specs(config)}
    linear = linear_specs(config)
    biases = [spec.attention.position for spec in linear if spec.attention.has_additive_bias]
    require(
        not (biases and a.is_linear_form),
        f"attention.implementation = {a.implementation!r}: {''.join(biases[:1])} is an additive bias, which a linear "
        "kernel computes only in the quadratic forms; use 'reference' or 'blockwise'",
    )
    require(
        bool(linear) or a.is_linear or not a.is_linear_form,
        f"attention.implementation = {a.implementation!r}: softmax has no linear form; use 'blockwise', 'reference' "
        "or 'auto'",
    )
    require(
        not (a.implementation == "pallas" and "power" in kernels and a.degree != 2),
        f"attention.implementation = 'pallas': it has attention.degree = 2, not {a.degree}; use 'chunked' or 'auto'",
    )
    require(
        not ("rebased" in kernels and a.qk_norm),
        "attention.qk_norm = True: rebased normalises queries and keys itself; use false",
    )
    require(
        a.qk_norm or a.qk_norm_span == "head",
        f"attention.qk_norm_span = {a.qk_norm_span!r}: attention.qk_norm is false; set it to true, or use 'head'",
    )
    require(
        not a.blend_steps or ("power" in kernels and a.blend_from != "none"),
        f"attention.blend_steps = {a.blend_steps}: attention.blend_from = {a.blend_from!r} fades into kernel power, "
        f"and the layers are {' and '.join(sorted(kernels))}; use {' or '.join(variants.BLENDABLE)} and power, or 0",
    )
    for name, asked in (("log_length_scale", a.log_length_scale), ("sinks", a.sinks)):
        require(
            "softmax" in kernels or not asked,
            f"attention.{name} = True: is of softmax layers, and all that attend are {' or '.join(sorted(kernels))}; "
            "use false",
        )
    _check_vector_gates(config)
    require(a.conv_width >= 2, f"attention.conv_width = {a.conv_width}: a convolution needs at least 2 taps")
    require(
        a.gate_min_timescale <= a.gate_max_timescale,
        f"attention.gate_min_timescale = {a.gate_min_timescale}: must not exceed gate_max_timescale",
    )


def _check_vector_gates(config: Config) -> None:
    vector = [spec.attention for spec in attention_specs(config) if spec.attention.gate == "vector"]
    require(
        all(attention.is_linear for attention in vector),
        "attention.gate = 'vector': is inside the scores of a linear kernel, and softmax, of `window` layers too, has "
        "one gate a head; use 'data', or a row of the variants table in attention.layer_pattern for each kind of layer",
    )
    require(
        not {attention.position for attention in vector} & {*variants.BIAS_POSITIONS},
        f"attention.gate = 'vector': attention.position {_is(positions(config))}, and biases and slopes have no place "
        "beside it; use 'data', or 'none' or a rotary position",
    )
    require(
        not (vector and config.attention.implementation == "pallas"),
        "attention.implementation = 'pallas': it has one gate a head, and attention.gate is 'vector'; use 'chunked' or "
        "'auto'",
    )


def _check_mixture(config: Config) -> None:
    """What one layer cannot have without the others."""
    found = positions(config)
    for name, why in _OF_ALL_LAYERS:
        others = [other for other in found if other != name]
        require(
            name not in found or not others,
            f"attention.layer_pattern = {config.attention.layer_pattern}: {name} {why}, and layers beside it have "
            f"position {' and '.join(map(repr, others))}; give all of them {name!r}, or none",
        )


_OF_ALL_LAYERS = (
    *((name, "is added to the embeddings, which all layers read") for name in variants.ABSOLUTE_POSITIONS),
    ("fire_shared", "is one bias of all layers"),
)


def _is(found: tuple[str, ...]) -> str:
    """`is 'rope'` of one position, `is one of 'rope', 'none'` of several."""
    return f"is {found[0]!r}" if len(found) == 1 else f"is one of {', '.join(map(repr, found))}"


def _check_rotation(config: Config) -> None:
    m, a, p = config.model, config.attention, config.position
    found = positions(config)
    require(
        p.rotary_fraction == 1 or bool({*found} & {*variants.ROTARY_POSITIONS}),
        f"position.rotary_fraction = {p.rotary_fraction}: attention.position {_is(found)}, which rotates nothing; "
        "use 1.0, or rope",
    )
    require(
        p.rotation != "frequency" or "learned_rope" in found,
        f"position.rotation = 'frequency': is of learned_rope, and attention.position {_is(found)}; use 'variant' or "
        "'scalar', or learned_rope",
    )
    for spec in attention_specs(config):
        if spec.attention.position not in variants.ROTARY_POSITIONS:
            continue
        head_dim = spec.qk_head_dim(m)
        require(
            p.rotary_fraction != 1 or head_dim % 2 == 0,
            f"head_dim = {head_dim}: {spec.attention.position} rotates pairs, so it must be even",
        )
        dims = int(p.rotary_fraction * head_dim)
        require(
            p.rotary_fraction == 1 or (2 <= dims < head_dim and dims % 2 == 0),
            f"position.rotary_fraction = {p.rotary_fraction}: is {dims} of {head_dim} dims, and pairs are rotated; use "
            f"an even number of dims over {head_dim}, such as {head_dim // 4 * 2 / head_dim:g}",
        )
    require(
        not p.window_base or (a.position == "rope" and p.convention == "standard" and "window" in a.layer_pattern),
        f"position.window_base = {p.window_base}: is the base of rope in `window` layers, but attention.position is "
        f"{a.position!r}, position.convention {p.convention!r} and attention.layer_pattern {a.layer_pattern}; use 0",
    )
    require(
        p.beta_slow < p.beta_fast,
        f"position.beta_slow = {p.beta_slow}: must be below position.beta_fast = {p.beta_fast}",
    )
    require(
        p.low_freq_factor < p.high_freq_factor,
        f"position.low_freq_factor = {p.low_freq_factor}: must be below position.high_freq_factor = "
        f"{p.high_freq_factor}",
    )


def _check_position(config: Config) -> None:
    m, p = config.model, config.position
    _check_rotation(config)
    found = positions(config)
    absolute = absolute_position(config)
    require(
        not any(spec.position.scaling == "dynamic_ntk" for spec in linear_specs(config)),
        "position.scaling = 'dynamic_ntk': it rotates old keys again as the text grows, which a finite state cannot "
        "do; use 'ntk' or 'yarn', or a softmax variant",
    )
    require(
        p.scaling == "none" or "rope" in found,
        f"position.scaling = {p.scaling!r}: only rope is scaled, and attention.position {_is(found)}; use 'none'",
    )
    require(
        p.scaling == "none" or p.convention == "standard",
        f"position.convention = {p.convention!r}: scalings are defined on the standard frequencies; set one of "
        "position.scaling = 'none' and position.convention = 'standard'",
    )
    require(
        p.scaling == "none" or p.factor >= 1,
        f"position.factor = {p.factor}: {p.scaling} reaches further than position.original_length; use at least 1",
    )
    require(
        p.scaling != "yarn" or p.base > 1,
        f"position.base = {p.base}: yarn takes its logarithm; use a base above 1, such as 10000",
    )
    require(
        absolute != "learned_absolute" or longest(config) <= p.max_length,
        f"position.max_length = {p.max_length}: learned_absolute needs a row for each position of data.seq_len and "
        f"evaluation.lengths; use at least {longest(config)}",
    )
    require(
        p.alibi_slope_scale == 1 or "alibi" in found,
        f"position.alibi_slope_scale = {p.alibi_slope_scale}: attention.position {_is(found)}, which has no "
        "slopes; use 1.0, or a variant with alibi",
    )
    require(
        absolute != "sinusoidal" or m.embed_dim % 2 == 0,
        f"model.embed_dim = {m.embed_dim}: sinusoidal positions are pairs of a sine and a cosine, so it must be even",
    )


def check_scaling_acts(config: Config) -> None:
    """Raises ConfigError for a position.scaling that leaves every frequency as it is: a factor of 1.

    A run that was trained so can be read and continued; nothing new starts so.
    """
    p = config.position
    require(
        p.scaling in ("none", "dynamic_ntk") or p.factor != 1,
        f"position.factor = {p.factor}: position.scaling = {p.scaling!r} changes nothing with it; set position.factor "
        f"to the longest context over position.original_length = {p.original_length}, or position.scaling = 'none'",
    )
