"""Synthetic tasks: recall and copying, as batches that are a pure function of (seed, step)."""
