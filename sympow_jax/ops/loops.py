"""Names for loops whose length a compiler cannot know, so that a plan can count their work."""

import math

import jax


def causal_pairs(num_queries: int, num_keys: int, size: int, window: int | None = None) -> float:
    """Pairs of tiles with visible entries: each of num_queries tiles sees half of num_keys, or what a window spans."""
    seen = (num_keys + 1) / 2
    if window is not None:
        seen = min(seen, 1.0 + math.ceil((window - 1) / size))
    return num_queries * seen


def expected_trips(trips: float):
    """A context for a loop that is expected to run `trips` times: its scope in the compiled program says so."""
    return jax.named_scope(f"trips_{trips:g}")


def expected_trips_in_all(trips: float):
    """The same for a loop that runs `trips` times over all turns of the loop with `expected_trips` around it."""
    return jax.named_scope(f"trips_{trips:g}_in_all")
