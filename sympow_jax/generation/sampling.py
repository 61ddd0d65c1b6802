"""From next-token logits to tokens: temperature, top-k, top-p."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.config import ConfigError
from sympow_jax.typing import Array, Float, Int

LEAST = 1e-6  # of temperature and top_p: float32 holds logits divided by it, and a share of a sum of 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from softmax(logits / temperature).

    Attributes:
      temperature: 0 takes the most likely token (the first of equals).
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the most likely tokens until their probability reaches top_p (Holtzman et al. 2020); 1 keeps all.
      seed: of the draws. A draw depends on the seed, the row and the position, so a stream that was saved and
        continued draws what it would have drawn uninterrupted, and a row draws the same in any batch.

    Raises:
      ConfigError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (
                self.temperature == 0 or LEAST <= self.temperature <= 1 / LEAST,
                f"0, which takes the most likely token, or from {LEAST:g} to {1 / LEAST:g}",
            ),
            "top_k": (self.top_k >= 0, "at least 0, where 0 keeps all tokens"),
            "top_p": (LEAST <= self.top_p <= 1, f"from {LEAST:g} to 1, where 1 keeps all tokens"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 4,294,967,295"),
        }
        for name, (legal, hint) in checks.items():
            if not legal:
                raise ConfigError(f"--{name} = {getattr(self, name)!r}: must be {hint}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError when more tokens are to be kept than there are."""
        if self.top_k > vocab_size:
            raise ConfigError(f"--top_k = {self.top_k}: the vocabulary has {vocab_size:,} tokens; 0 keeps all")


def sample(logits: Float[Array, "B V"], position: int, sampling: Sampling) -> Int[Array, "B"]:
    """One token a row, int32, for the token at `position` (from 0) of the stream."""
    if sampling.temperature == 0:
        return _most_likely(logits)
    options = (np.float32(sampling.temperature), np.float32(sampling.top_p))  # of no device
    top_k = min(sampling.top_k, logits.shape[1])
    return _draw(logits, np.uint32(sampling.seed), np.uint32(position), *options, top_k, sampling.top_p < 1)


@jax.jit
def _most_likely(logits: Array) -> Array:
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _draw(
    logits: Array, seed: Array, position: Array, temperature: Array, top_p: Array, top_k: int, nucleus: bool
) -> Array:
    logits = logits.astype(jnp.float32) / temperature
    if top_k:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if nucleus:
        logits = jnp.where(logits < _nucleus_threshold(logits, top_p), -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(seed), position)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0], dtype=jnp.uint32))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus_threshold(logits: Array, top_p: Array) -> Array:
    """The smallest logit [B, 1] among the most likely tokens whose probability first reaches top_p."""
    ordered = jnp.sort(logits, axis=1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=1, keepdims=True)
