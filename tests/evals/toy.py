"""Small exact language models and a store in memory, for tests of evaluations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sympow_jax.input_pipeline.store import Store


@dataclasses.dataclass(frozen=True)
class ArrayStore(Store):
    """An array of tokens [N, L] as a store."""

    tokens: np.ndarray
    clusters: np.ndarray
    bos_id: int
    digest: str = "toy"
    address: str = "toy-store"
    chunks: tuple[int, int] = (1, 64)
    tokenizer: Any = None

    @property
    def num_documents(self) -> int:
        return self.tokens.shape[0]

    @property
    def document_length(self) -> int:
        return self.tokens.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.bos_id + 1

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        return self.tokens[rows, columns]


@dataclasses.dataclass(frozen=True)
class CountedStore(ArrayStore):
    """One that remembers which rows were read, in order."""

    rows_read: list[int] = dataclasses.field(default_factory=list)

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        self.rows_read.extend(range(rows.start, rows.stop))
        return super()._read(rows, columns)


@dataclasses.dataclass(frozen=True)
class RunningCount:
    """nll of target y = params[y] / (1 + number of inputs so far, BOS included): it depends on the whole context."""

    streams_constant: bool = True
    depends_on_length: bool = False
    mesh: None = None

    def initial_state(self, batch_size: int, max_length: int) -> jax.Array:
        return jnp.zeros((batch_size,), jnp.float32)

    def nll(self, params, inputs, targets, *, state=None, length=0):
        seen = jnp.zeros(inputs.shape[:1], jnp.float32) if state is None else state
        context = seen[:, None] + 1 + jnp.arange(inputs.shape[1], dtype=jnp.float32)[None]
        final = None if state is None else seen + inputs.shape[1]
        return params[targets] / (1 + context), final


@dataclasses.dataclass(frozen=True)
class Bigram:
    """nll of target y after x = params[x, y]; it sees BOS and nothing beyond the previous token."""

    streams_constant: bool = True
    depends_on_length: bool = False
    mesh: Mesh | None = None

    def initial_state(self, batch_size: int, max_length: int) -> jax.Array:
        return jnp.zeros((batch_size,), jnp.int32)

    def nll(self, params, inputs, targets, *, state=None, length=0):
        return params[inputs, targets], state


def make_store(num_documents: int = 10, length: int = 300, num_clusters: int = 5, vocab: int = 7) -> ArrayStore:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab, (num_documents, length)).astype(np.uint16)
    return ArrayStore(tokens, np.arange(num_documents) % num_clusters, bos_id=vocab)
