"""The decoder: embeddings, a stack of layers scanned run by run, a final norm and the output projection."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sympow_jax import ops, sharding
from sympow_jax.config import Config, LayerSpec, absolute_position, layer_specs, positions
from sympow_jax.layers.block import Block
from sympow_jax.layers.context import Context
from sympow_jax.layers.norm import make_norm
from sympow_jax.layers.position_bias import BiasParameters
from sympow_jax.models.remat import BLOCK_INPUT, rematerialise
from sympow_jax.typing import AnyArray, Array, Float, Int, PyTree

UNROLLED_TOKENS = 16  # up to here a pass through a state is decoding: moving bytes costs more than compiling each layer


def layer_runs(config: Config) -> list[tuple[LayerSpec, int]]:
    """[(spec, number of layers)] of consecutive equal layers."""
    return [(spec, len(list(group))) for spec, group in itertools.groupby(layer_specs(config))]


class Transformer(nnx.Module):
    """Token ids -> hidden states before the output projection.

    Layers of one run are stacked along a leading dim of their parameters (`blocks_0`, `blocks_1`, ...) and scanned.
    """

    def __init__(self, config: Config, vocab_size: int, *, rngs: nnx.Rngs):
        m, self.config = config.model, config
        V = m.vocab_size or vocab_size
        init = nnx.initializers.normal(m.init_std)
        self.embedding = nnx.Embed(V, m.embed_dim, dtype=m.dtype, embedding_init=init, rngs=rngs)
        if absolute_position(config) == "learned_absolute":
            self.position_embedding = nnx.Embed(
                config.position.max_length, m.embed_dim, dtype=m.dtype, embedding_init=init, rngs=rngs
            )
        if "fire_shared" in positions(config):
            self.shared_bias = BiasParameters("fire", m.num_heads, rngs=rngs)
        if m.embedding_norm:
            self.embedding_norm = make_norm(m, rngs=rngs)
        for i, (spec, depth) in enumerate(layer_runs(config)):
            setattr(self, f"blocks_{i}", self._make_run(spec, depth, rngs))
        self.final_norm = make_norm(m, rngs=rngs)
        if not m.tied_embeddings:
            self.output = nnx.Param(init(rngs.params(), (m.embed_dim, V)))

    def _make_run(self, spec: LayerSpec, depth: int, rngs: nnx.Rngs) -> Block:
        keys = jax.random.split(rngs.params(), depth)
        return nnx.vmap(lambda key: Block(spec, self.config.model, rngs=nnx.Rngs(key)))(keys)

    def output_kernel(self) -> Float[Array, "E V"]:
        """The projection to logits, the transposed embedding when tied."""
        return self.embedding.embedding[...].T if self.config.model.tied_embeddings else self.output[...]

    def initial_state(self, batch_size: int, max_length: int) -> PyTree:
        """The empty state of a stream: tokens seen, and for each run the states of its layers.

        Layers are apart, so that a compiled step that owns its state writes each of them in place.
        """
        state = {"offset": jnp.int32(0)}
        for i, (_, depth) in enumerate(layer_runs(self.config)):
            mixer = getattr(self, f"blocks_{i}").mixer
            state[f"blocks_{i}"] = tuple(mixer.initial_state(batch_size, max_length) for _ in range(depth))
        return state

    def __call__(
        self,
        tokens: Int[AnyArray, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: PyTree | None = None,
        length: int,
        softmax_share: Float[Array, ""] | None = None,
        outputs: list[Array] | None = None,
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        """Hidden states, and the next state when one is given. `length` is the longest context of the stream.

        softmax_share is the weight of attention.blend_from's outputs, in training on whole sequences. `outputs` gets
        what each layer makes of the stream, [depth, B, T, E] for every run of equal layers.
        """
        offset = jnp.int32(0) if state is None else state["offset"]
        shared = self.shared_bias.bias() if hasattr(self, "shared_bias") else None
        context = Context(offset, positions, segment_ids, shared, length, softmax_share)
        x = self._embed(tokens, context)
        runs = {}
        for i, _ in enumerate(layer_runs(self.config)):
            name = f"blocks_{i}"
            states = None if state is None else state[name]
            x, runs[name] = self._apply_run(getattr(self, name), x, context, states, outputs)
        x = self.final_norm(x)
        return x, None if state is None else {"offset": offset + tokens.shape[1], **runs}

    def begin(self, tokens: Int[AnyArray, "B T"]) -> tuple[Float[Array, "B T E"], Context]:
        """The input of the first layer, and the context of a pass over whole sequences."""
        shared = self.shared_bias.bias() if hasattr(self, "shared_bias") else None
        context = Context(jnp.int32(0), None, None, shared, max(tokens.shape[1], self.config.position.original_length))
        return self._embed(tokens, context), context

    def layers(self) -> Iterator[Block]:
        """Each layer in turn, unrolled."""
        for i, _ in enumerate(layer_runs(self.config)):
            yield from _unstack(getattr(self, f"blocks_{i}"))

    def layer_inputs(self, tokens: Int[AnyArray, "B T"]) -> Iterator[tuple[int, nnx.Module, Array, Context]]:
        """(layer number, mixer, the input that it sees, context) of each layer in turn, unrolled."""
        x, context = self.begin(tokens)
        for number, block in enumerate(self.layers()):
            yield number, block.mixer, block.mixer_input(x), context
            x, _ = block(x, context)

    def _check_length(self, length: int) -> None:
        rows = self.config.position.max_length
        if length > rows:
            raise ValueError(
                f"length {length}: learned_absolute has positions for {rows} tokens; use at most {rows}, or train with "
                "a larger --config.position.max_length"
            )

    def _embed(self, tokens: AnyArray, context: Context) -> Array:
        x, scale = _rows(self.embedding, tokens), self.config.model.embedding_scale
        x = x if scale == 1 else x * jnp.asarray(scale, x.dtype)
        encoding = absolute_position(self.config)
        if encoding != "none":
            where = context.token_positions(tokens.shape[1])
            if encoding == "learned_absolute":
                self._check_length(tokens.shape[1])
                last = self.config.position.max_length - 1  # padding of a stream may lie beyond it
                x = x + _rows(self.position_embedding, jnp.minimum(where, last))
            else:
                table = ops.positions.sinusoidal(where, self.config.model.embed_dim)
                x = x + (self.config.model.init_std * table).astype(x.dtype)
        x = self.embedding_norm(x) if hasattr(self, "embedding_norm") else x
        return sharding.constrain(x, sharding.BATCH, "seq")

    def _apply_run(
        self, run: Block, x: Array, context: Context, states: PyTree | None, outputs: list[Array] | None
    ) -> tuple[Array, PyTree | None]:
        if states is not None and (
            x.shape[1] <= UNROLLED_TOKENS or isinstance(states[0].get("kernel"), ops.cache.KVCache)
        ):
            return _apply_unrolled(run, x, context, states, outputs)
        graph, parameters = nnx.split(run)

        def body(x, layer):
            layer_parameters, layer_state = layer
            x = checkpoint_name(x, BLOCK_INPUT)
            x, layer_state = nnx.merge(graph, layer_parameters)(x, context, layer_state)
            x = sharding.constrain(x, sharding.BATCH, "seq")
            return x, (layer_state, None if outputs is None else x)

        body = rematerialise(body, self.config.model.remat)
        depth = jax.tree.leaves(parameters)[0].shape[0]
        stacked = None if states is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        unroll = 1 if self.config.model.scan_layers else depth
        x, (stacked, seen) = jax.lax.scan(body, x, (parameters, stacked), unroll=unroll)
        if outputs is not None and seen is not None:
            outputs.append(seen)
        return x, None if states is None else tuple(_pick(stacked, n) for n in range(depth))


def _apply_unrolled(
    run: Block, x: Array, context: Context, states: PyTree, outputs: list[Array] | None
) -> tuple[Array, PyTree]:
    """Layer after layer, without the copies of states that a scan makes."""
    after, seen = [], []
    for block, state in zip(_unstack(run), states, strict=True):
        x, state = block(x, context, state)
        x = sharding.constrain(x, sharding.BATCH, "seq")
        after.append(state)
        seen.append(x)
    if outputs is not None:
        outputs.append(jnp.stack(seen))
    return x, tuple(after)


def _unstack(run: Block) -> Iterator[Block]:
    graph, parameters = nnx.split(run)
    for n in range(jax.tree.leaves(parameters)[0].shape[0]):
        yield nnx.merge(graph, _pick(parameters, n))


def _pick(stacked: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[n], stacked)


def _rows(embed: nnx.Embed, index: AnyArray) -> Array:
    return sharding.look_up(embed.embedding[...], index, embed.dtype)
