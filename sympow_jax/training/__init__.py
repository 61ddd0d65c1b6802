"""The training run: optimizer, step, loop, checkpoints and metrics."""
