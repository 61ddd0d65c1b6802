"""State tracking: the running product of group elements (Merrill, Petty and Sabharwal 2024, arXiv 2404.08819).

Token x_t is an element of a group, uniform and independent; the target at t is the element x_1 x_2 ... x_t, asked
for at every t. Every target is uniform over the group, so chance is 1 / vocab_size, and one forgotten token is as bad
as all.
"""

import dataclasses
import functools
import itertools

import numpy as np

from sympow_jax.input_pipeline.tasks.synthetic import Batch, as_batch, uniform

MOST = 4_096  # elements of a group, whose table of products then has 128 MiB
PERMUTED = 5  # S5, the smallest symmetric group that is not solvable: its word problem is complete for NC^1


@functools.cache
def product_table(group: str) -> np.ndarray:
    """Number of a b for elements a, b -> [n, n]; `group` is S5 or ZN, N from 2 to MOST."""
    if group == "S5":
        elements = list(itertools.permutations(range(PERMUTED)))
        number = {element: i for i, element in enumerate(elements)}
        return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])
    order = int(group[1:])
    return np.add.outer(np.arange(order), np.arange(order)) % order


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """A task of `input_pipeline.synthetic`.

    Attributes:
      seq_len: number of factors.
      group: Z2 is parity, ZN counting modulo N in steps of 0 to N - 1, S5 the permutations of five things.
    """

    seq_len: int
    group: str = "Z2"

    def __post_init__(self):
        if self.group != "S5" and not (self.group.startswith("Z") and 2 <= int(self.group[1:] or 0) <= MOST):
            raise ValueError(f"group {self.group!r}: must be S5, or ZN with a modulus N from 2 to {MOST:,}")

    @property
    def vocab_size(self) -> int:
        """The order of the group."""
        return len(product_table(self.group))

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """See Task.batch."""
        table = product_table(self.group)
        inputs = (uniform(seed, step, (batch_size, self.seq_len)) * len(table)).astype(np.int64)
        targets = inputs.copy()
        for t in range(1, self.seq_len):
            targets[:, t] = table[targets[:, t - 1], inputs[:, t]]
        return as_batch(inputs, targets, np.ones(inputs.shape))
