"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927), the generator of its experiments.

An example is k_1 v_1 ... k_n v_n, then queries: the sequence after the pairs has (T - 2n) / 2 slots of two tokens,
and each key is asked for exactly once at the first token of a slot of its own. Slot r is drawn with probability
proportional to (r + 1)^(power - 1), without replacement, so that most queries come soon. The target at a query is its
value; there is no shift, and the value does not follow the query in the input.
"""

import dataclasses

import numpy as np

from sympow_jax.input_pipeline.tasks.synthetic import Batch, TooShortError, as_batch, choose_distinct, uniform


@dataclasses.dataclass(frozen=True)
class MQAR:
    """A task of `input_pipeline.synthetic`.

    Attributes:
      seq_len: T, even and at least 2 num_pairs (num_passes + 1).
      num_pairs: n key-value pairs; as many queries.
      vocab_size: V > T. Keys are in [1, V/2), values in [V/2, V), both without repetition in an example.
      power: a of the distribution of slots; 1 is uniform.
      random_filler: other tokens after the pairs are uniform in [0, V), Zoology's default and the Based paper's
        setting; otherwise 0, the setting of the Zoology and ReBased papers.
      num_passes: how often the pairs are written before the queries, each time in the same order.
    """

    seq_len: int
    num_pairs: int = 8
    vocab_size: int = 8192
    power: float = 0.01
    random_filler: bool = True
    num_passes: int = 1

    def __post_init__(self):
        T, n, V = self.seq_len, self.num_pairs, self.vocab_size
        least = 2 * n * (self.num_passes + 1)
        if T % 2 or n < 1 or self.num_passes < 1 or least > T:
            raise TooShortError(
                f"seq_len {T}, num_pairs {n}, num_passes {self.num_passes}: seq_len must be even and at least {least}, "
                "2 num_pairs (num_passes + 1)"
            )
        if T >= V or n > V // 2 - 1:
            raise ValueError(f"vocab_size {V}: must exceed seq_len {T} and hold {n} distinct keys")

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        T, n, half = self.seq_len, self.num_pairs, self.vocab_size // 2
        context = 2 * n * self.num_passes
        num_keys, num_values, slots = half - 1, self.vocab_size - half, (T - context) // 2
        random = uniform(seed, step, (batch_size, num_keys + num_values + slots + T))
        for_keys, for_values, for_slots, for_filler = np.split(random, np.cumsum([num_keys, num_values, slots]), axis=1)
        keys = 1 + choose_distinct(for_keys, n)
        values = half + choose_distinct(for_values, n)
        # The order of exponential arrival times of rates p_r is that of draws without replacement.
        rates = np.arange(1, slots + 1) ** (self.power - 1.0)
        queries = context + 2 * choose_distinct(-np.log1p(-for_slots) / rates[None], n)

        inputs = np.zeros((batch_size, T), np.int64)
        inputs[:, :context:2] = np.tile(keys, self.num_passes)
        inputs[:, 1:context:2] = np.tile(values, self.num_passes)
        np.put_along_axis(inputs, queries, keys, axis=1)
        if self.random_filler:
            inputs = np.where(inputs == 0, (for_filler * self.vocab_size).astype(np.int64), inputs)
        targets, loss_mask = np.zeros_like(inputs), np.zeros(inputs.shape)
        np.put_along_axis(targets, queries, values, axis=1)
        np.put_along_axis(loss_mask, queries, 1.0, axis=1)
        return as_batch(inputs, targets, loss_mask)
