"""Does a model compute the same in every form? Layer by layer, on the user's checkpoint, text and dtype.

Each layer sees the input that it has in the dense parallel pass, and its output there is compared with that of its
other forms: blockwise, chunked and recurrent where the kernel has them, and prefill + decode, which reads the first
half of the tokens at once through the layer's state and the others one by one. Linear kernels with an additive bias
have the dense and the blockwise form alone. The error of a token is

    |form_t - dense_t| / max(|dense_t|, a tenth of the layer's root mean square),

and its tolerance grows with the row's condition number (ops/linear_attention/diagnostics.py), because a sum over
expanded features of an ill-conditioned row loses that many digits in any order of summation.
"""

import dataclasses
import functools
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from sympow_jax import ops, sharding
from sympow_jax.config import linear_specs, override
from sympow_jax.generation.decoder import Decoder
from sympow_jax.generation.text import prompt_tokens
from sympow_jax.input_pipeline.tokenizers import Tokenizer
from sympow_jax.layers.attention import Attention
from sympow_jax.layers.block import Block
from sympow_jax.layers.context import Context
from sympow_jax.models.model import Model
from sympow_jax.models.transformer import layer_runs
from sympow_jax.ops.linear_attention.dispatch import LINEAR_FORMS
from sympow_jax.typing import AnyArray, Array, Float, PyTree

DEFAULT_LENGTH, LONGEST = 320, 2_048  # tokens; the dense forms are quadratic
TOLERANCES = {"float32": 2e-5, "bfloat16": 3e-2}  # of a row with condition number 1
DIGITS_PER_CONDITION = {"float32": 2e-6, "bfloat16": 2e-6}  # states and their sums are float32 in both


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """The worst token of a layer in one form.

    Attributes:
      layer, kind, form: which; kind is the layer's name in the pattern, and form "chunked", "prefill + decode", ...
      position: of the token whose error is largest relative to its tolerance.
      error: relative error of that token.
      factor: what its condition number multiplies the tolerance by, >= 1; 1 for layers without a linear kernel.
      tolerance: tolerance of a row with factor 1.
    """

    layer: int
    kind: str
    form: str
    position: int
    error: float
    factor: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """error / (factor tolerance): at most 1 when the forms agree."""
        return self.error / (self.factor * self.tolerance) if np.isfinite(self.error) else np.inf


def check_tokens(tokenizer: Tokenizer, text: str, bound: int | None = None) -> np.ndarray:
    """[1, T] with BOS: of `text`, at most LONGEST tokens, or, when it is empty, of an English docstring.

    `bound` is how many the model has positions for, if anything bounds them.
    """
    most = LONGEST if text else DEFAULT_LENGTH
    return prompt_tokens(tokenizer, text or str(textwrap.TextWrapper.__doc__))[:, : min(most, bound or most)]


def check_layers(model: Model, params: PyTree, tokens: np.ndarray) -> list[LayerCheck]:
    """Every layer in every form that it has against its dense form."""
    config, length = model.config, tokens.shape[1]
    linear = LINEAR_FORMS if linear_specs(config) and model.streams else ()
    changes = {"attention.chunk_size": 3 * length // 10 + 1}  # several chunks, the last one ragged
    modules = {
        form: Model(override(config, changes | {"attention.implementation": form}), model.vocab_size).bind(params)
        for form in ("reference", "blockwise", *linear)
    }
    whole = sharding.everywhere(model.mesh)
    begin = jax.jit(lambda params, tokens: model.bind(params).begin(tokens), out_shardings=whole)
    x, context = begin(params, np.asarray(tokens, np.int32))
    found, number = [], 0
    for i, (spec, depth) in enumerate(layer_runs(config)):
        graphs, stacked = {}, None
        for form, module in modules.items():
            if form == "reference" or (spec.mixer == "attention" and (spec.attention.is_linear or form not in linear)):
                graphs[form], stacked = nnx.split(getattr(module, f"blocks_{i}"))
        compare = functools.partial(_compare, model.mesh, graphs, spec.attention.degree, spec.streams)
        compare = jax.jit(compare, out_shardings=whole)
        for n in range(depth):
            x, condition, errors = compare(stacked, np.int32(n), x, context)
            found += [_worst(number, spec.name, form, e, condition, config.model.dtype) for form, e in errors.items()]
            number += 1
    return found


def _worst(layer: int, kind: str, form: str, errors: Array, condition: Array, dtype: str) -> LayerCheck:
    tolerance = TOLERANCES[dtype]
    factors = 1.0 + np.asarray(condition, np.float64) * DIGITS_PER_CONDITION[dtype] / tolerance
    factors = np.where(np.asarray(condition) > 0, factors, 1.0)
    ratios = np.where(np.isfinite(errors), np.asarray(errors) / factors, np.inf)
    row, position = np.unravel_index(np.argmax(ratios), ratios.shape)
    return LayerCheck(
        layer, kind, form, int(position), float(errors[row, position]), float(factors[row, position]), tolerance
    )


def _compare(
    mesh: Mesh | None,
    graphs: dict[str, Any],
    degree: int,
    streams: bool,
    stacked: PyTree,
    number: AnyArray,
    x: Float[Array, "B T E"],
    context: Context,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
    """The layer's output, the condition number of each token (0 where no kernel is expanded), and errors by form.

    `stacked` holds the parameters of a run of layers, of which this is the one with the number.
    """
    parameters = jax.tree.map(lambda leaf: leaf[number], stacked)
    blocks = {form: nnx.merge(graph, parameters) for form, graph in graphs.items()}
    dense = blocks["reference"]
    inputs = dense.mixer_input(x)
    want = dense.mixer(inputs, context)[0].astype(jnp.float32)  # as one device computes it
    with sharding.use_mesh(mesh):
        outputs = {form: block.mixer(inputs, context)[0] for form, block in blocks.items() if form != "reference"}
        outputs |= {"prefill + decode": _decode(dense, inputs, context)} if streams else {}
    sizes = jnp.linalg.norm(want, axis=-1)
    floor = 0.1 * jnp.sqrt(jnp.mean(sizes**2)) + 1e-30
    errors = {
        form: jnp.linalg.norm(out.astype(jnp.float32) - want, axis=-1) / jnp.maximum(sizes, floor)
        for form, out in outputs.items()
    }
    return dense(x, context)[0], _condition(dense, degree, inputs, context), errors


def _decode(block: Block, inputs: Float[Array, "B T E"], context: Context) -> Float[Array, "B T E"]:
    """The first half through the state at once, the second half token by token."""
    B, T, _ = inputs.shape
    half = max(T // 2, 1)
    state = block.mixer.initial_state(B, T)
    first, state = block.mixer(inputs[:, :half], context, state)

    def step(carry, token):
        offset, state = carry
        out, state = block.mixer(token[:, None], dataclasses.replace(context, offset=offset), state)
        return (offset + 1, state), out[:, 0]

    _, rest = jax.lax.scan(step, (jnp.int32(half), state), jnp.moveaxis(inputs[:, half:], 1, 0))
    return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)


def _condition(block: Block, degree: int, inputs: Array, context: Context) -> Float[Array, "B T"]:
    """The largest condition number over the heads of a row."""
    mixer = block.mixer
    if not isinstance(mixer, Attention) or not mixer.linear:
        return jnp.zeros(inputs.shape[:2])
    q, k, log_gates, scale = mixer.kernel_inputs(inputs, context)
    if mixer.kernel == "taylor":
        return ops.taylor_condition(q, k, log_gates=log_gates, scale=scale).max(-1)
    return ops.power_condition(q, k, log_gates=log_gates, degree=2 if mixer.kernel == "rebased" else degree).max(-1)


def check_logits(model: Model, params: PyTree, tokens: np.ndarray) -> tuple[float, int, int]:
    """The parallel pass against prefill + decode: largest difference of logits, greedy tokens that agree, of how many.

    Where the token of one pass is nearly the best of the other, within ten tolerances of the logits' spread, the two
    are ties and agree.
    """
    logits = jax.jit(lambda p, t: model.logits(p, t)[0], out_shardings=sharding.everywhere(model.mesh))
    whole = np.asarray(logits(params, np.asarray(tokens, np.int32)))
    whole = whole[0, :, : model.vocab_size]
    decoder, half = Decoder(model, params), max(tokens.shape[1] // 2, 1)
    stream = decoder.start(1, tokens.shape[1])
    decoder.read(stream, tokens[:, :half])
    steps = [np.asarray(stream.logits)[0]]
    for t in range(half, tokens.shape[1]):
        decoder.read(stream, tokens[:, t : t + 1])
        steps.append(np.asarray(stream.logits)[0])
    decoded, parallel = np.stack(steps), whole[half - 1 :]
    chosen = np.argmax(decoded, axis=1)[:, None]
    behind = parallel.max(axis=1) - np.take_along_axis(parallel, chosen, axis=1)[:, 0]
    agree = behind <= 10 * TOLERANCES[model.config.model.dtype] * parallel.std()
    return float(np.abs(decoded - parallel).max()), int(agree.sum()), len(steps)


def check(model: Model, params: PyTree, tokens: np.ndarray) -> int:
    """Prints a row for the worst form of each layer, the worst layer, and the logits; 0 when all agree, else 1."""
    results = check_layers(model, params, tokens)
    passed, found = max(r.ratio for r in results) <= 1, "none: a linear kernel with an additive bias reads no stream"
    if model.streams:
        difference, agree, total = check_logits(model, params, tokens)
        passed = passed and agree == total
        found = f"largest difference {difference:.1e}; greedy tokens agree at {agree} of {total}"
    if jax.process_index() == 0:
        _print_layers(f"{model.config.variant}, {model.config.model.dtype}, {tokens.shape[1]} tokens", results)
        print(f"logits, prefill + decode: {found}\n{'all forms agree' if passed else 'FORMS DISAGREE'}")
    return 0 if passed else 1


def _print_layers(title: str, results: list[LayerCheck]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("layer", "kind", "worst form", "position", "error", "tolerance", "x condition factor", "ratio"):
        table.add_column(column, justify="left" if column in ("kind", "worst form") else "right")
    worst = [max((r for r in results if r.layer == n), key=lambda r: r.ratio) for n in range(results[-1].layer + 1)]
    for r in worst:
        numbers = (f"{r.error:.1e}", f"{r.tolerance:.0e}", f"{r.factor:.3g}", f"{r.ratio:.2f}")
        table.add_row(str(r.layer), r.kind, r.form, str(r.position), *numbers)
    Console(markup=False).print(table)
    last = max(worst, key=lambda r: r.ratio)
    print(f"forms: {', '.join(dict.fromkeys(r.form for r in results))}, each against the dense parallel form")
    print(
        f"worst layer {last.layer} ({last.kind}), {last.form}, token {last.position}: error {last.error:.1e}, "
        f"tolerance {last.tolerance:.0e} x {last.factor:.3g}, the condition factor of the row"
    )
