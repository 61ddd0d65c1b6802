"""sympow_jax: long-context language models with symmetric-power attention, in JAX."""

__version__ = "0.1.0"
