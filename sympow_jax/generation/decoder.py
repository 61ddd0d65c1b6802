"""Reading tokens into a state: a prompt in chunks, then one compiled step for every position."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sympow_jax import sharding
from sympow_jax.config import ConfigError
from sympow_jax.models.model import Model
from sympow_jax.typing import PyTree

RECENT = 64  # tokens that a stream remembers: what the text of the next one may depend on
CHUNK_SIZES = (512, 64, 8, 1)  # a prompt is read in as many of the first as fit, then of the second, ...: no padding


@dataclasses.dataclass
class Stream:
    """A batch of texts that are read token by token; `Decoder.read` replaces its arrays in place.

    Attributes:
      state: what the model keeps of the tokens: finite states, convolution tails, windows, or caches.
      logits: [B, V] of the next token, None before the first.
      tokens_read: tokens behind the state, BOS included.
      batch_size: B.
      max_length: most tokens that the stream can hold, at least what was asked for; None where nothing bounds it.
      recent: [B, at most RECENT] int32, the last tokens read.
    """

    state: PyTree
    logits: jax.Array | None
    tokens_read: int
    batch_size: int
    max_length: int | None
    recent: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))


class Decoder:
    """Feeds tokens to a model, with one compiled program for each of CHUNK_SIZES, whatever the position.

    On the model's mesh states lie over heads, and rows over data and fsdp where they divide; the tokens of a prompt lie
    over seq under a linear kernel. Every process reads the same tokens and sees the same logits.

    The programs own the state that they are given and write it in place.

    Attributes:
      compile_seconds: spent on compiling so far.
    """

    def __init__(self, model: Model, params: PyTree):
        self.model, self.compile_seconds = model, 0.0
        self._params = _unstack_layers(params, model.mesh)
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def start(self, batch_size: int = 1, max_length: int = 0) -> Stream:
        """An empty stream.

        Args:
          batch_size: rows that are read side by side.
          max_length: tokens the stream can hold, BOS included: the size of the cache of softmax layers, and what
            dynamic_ntk scales to. Not needed where the state has a constant size.

        Raises:
          ConfigError: a softmax model without max_length, or one beyond the rows of a learned_absolute table.
        """
        bound = self._longest(max_length)
        recent = np.zeros((batch_size, 0), np.int32)
        return Stream(self.model.initial_state(batch_size, bound or 1), None, 0, batch_size, bound, recent)

    def _longest(self, max_length: int) -> int | None:
        rows = self.model.max_length
        if rows is not None and max_length > rows:
            raise ConfigError(
                f"{max_length:,} tokens: learned_absolute has {rows:,} positions (position.max_length); use a shorter "
                "prompt or fewer new tokens"
            )
        if self.model.streams_constant:
            return rows
        if max_length < 1:
            raise ConfigError(f"max_length = {max_length}: a softmax cache needs the number of tokens it must hold")
        if self.model.depends_on_length:
            return max_length
        room = _bucket(max_length)
        return room if rows is None else min(room, rows)

    def read(self, stream: Stream, tokens: np.ndarray | jax.Array) -> None:
        """Reads tokens [B, T] into the stream, T >= 0, and leaves the logits of the token after them.

        Raises:
          ConfigError: more tokens than the stream can hold, or ids outside of the vocabulary.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.shape[:1] != (stream.batch_size,) or tokens.ndim != 2:
            raise ConfigError(f"tokens have shape {tokens.shape}: the stream takes [{stream.batch_size}, T]")
        total = stream.tokens_read + tokens.shape[1]
        if stream.max_length is not None and total > stream.max_length:
            raise ConfigError(
                f"{total:,} tokens: the stream holds max_length = {stream.max_length:,}; start a longer one"
            )
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.model.vocab_size):
            raise ConfigError(
                f"token ids must be from 0 to {self.model.vocab_size - 1}, got {tokens.min()}..{tokens.max()}"
            )
        start = 0
        for size in CHUNK_SIZES:
            while tokens.shape[1] - start >= size:
                program = self._program(stream, size)
                stream.logits, stream.state = program(self._params, tokens[:, start : start + size], stream.state)
                jax.block_until_ready(stream.logits)  # a backend holds a bounded number of programs of several devices
                start += size
        stream.tokens_read = total
        stream.recent = np.concatenate([stream.recent, tokens], axis=1)[:, -RECENT:]

    def prepare(self, stream: Stream, num_tokens: int) -> None:
        """Compiles what reading `num_tokens`, and then single tokens, will need."""
        for size in CHUNK_SIZES:
            if num_tokens >= size or size == 1:
                self._program(stream, size)
            num_tokens %= size

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def read_each(self, state: PyTree, tokens: np.ndarray, max_length: int | None) -> tuple[jax.Array, PyTree]:
        """Reads one token [N] into each of N streams of one row, which may be of different lengths.

        Args:
          state: of the streams, stacked; it is written in place.
          tokens: int32.
          max_length: of each stream.

        Returns:
          The logits [N, V] of the next tokens, and the next state.
        """

        def advance(params, tokens, state, length):
            each = functools.partial(self.model.next_logits, params, length=length)
            logits, state = jax.vmap(lambda token, row: each(token[None, None], row))(tokens, state)
            return logits[:, 0], state

        program = self._compiled(("each", len(tokens), max_length), advance, tokens, state, max_length)
        return program(self._params, tokens, state)

    def _program(self, stream: Stream, size: int) -> jax.stages.Compiled:
        def advance(params, tokens, state, length):
            return self.model.next_logits(params, tokens, state, length=length)

        tokens = jax.ShapeDtypeStruct((stream.batch_size, size), jnp.int32)
        key = (stream.batch_size, stream.max_length, size)
        return self._compiled(key, advance, tokens, stream.state, stream.max_length)

    def _compiled(
        self, key: tuple, advance: Callable, tokens: Any, state: PyTree, max_length: int | None
    ) -> jax.stages.Compiled:
        if key not in self._programs:
            begin = time.perf_counter()
            length = (max_length or 0) if self.model.depends_on_length else 0
            whole = sharding.everywhere(self.model.mesh)
            tokens = jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=whole)
            program = jax.jit(
                lambda layers, tokens, state: advance(_stack_layers(layers), tokens, state, length),
                donate_argnums=2,
                out_shardings=(whole, None),
            )
            self._programs[key] = program.lower(self._params, tokens, state).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._programs[key]


def _bucket(length: int) -> int:
    """Room for `length` tokens, of few sizes, so that texts of many lengths share compiled programs.

    Powers of two from 64 to 4,096, then multiples of 4,096.
    """
    return max(64, 1 << (length - 1).bit_length()) if length <= 4096 else -(-length // 4096) * 4096


def _unstack_layers(params: PyTree, mesh: Mesh | None) -> PyTree:
    """Parameters with those of each layer apart: a compiled step need not cut them out of the stack every time."""

    @jax.jit
    def cut(stacked):
        depth = jax.tree.leaves(stacked)[0].shape[0]
        layers = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(depth)]
        if mesh is not None:
            layers = [jax.lax.with_sharding_constraint(x, sharding.tree_shardings(x, mesh)) for x in layers]
        return tuple(layers)

    return {name: cut(tree) if name.startswith("blocks_") else tree for name, tree in params.items()}


def _stack_layers(layers: PyTree) -> PyTree:
    """The inverse, inside of a program, which simplifies a cut of a stack to the layer itself."""
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree) if isinstance(tree, tuple) else tree
        for name, tree in layers.items()
    }
