"""How often each of equally likely numbers is found."""

import numpy as np


def shares_are_uniform(numbers, first, count):
    """first .. first + count - 1 are found equally often, neither more nor less than by chance, and nothing else."""
    found = np.bincount(np.ravel(numbers) - first, minlength=count)
    assert len(found) == count
    expected = found.sum() / count
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected), found
