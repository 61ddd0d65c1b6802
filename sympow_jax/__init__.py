"""sympow_jax: long-context language models with symmetric-power attention, in JAX."""

__version__ = "0.1.0"


def load(workdir, step="latest", **options):
    """(model, params, tokenizer) of a trained run; see sympow_jax.loading.load."""
    from sympow_jax import loading

    return loading.load(workdir, step, **options)
