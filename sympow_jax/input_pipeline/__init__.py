"""Tokens on disk to batches: stores, tokenizers, sampling order, packing, prefetch, and the builder of stores."""

from sympow_jax.input_pipeline.batches import BatchSource, make_batches
from sympow_jax.input_pipeline.metadata import StoreError
from sympow_jax.input_pipeline.opening import open_batches, open_data
from sympow_jax.input_pipeline.packing import open_packed_store
from sympow_jax.input_pipeline.prefetch import Prefetch, prefetch
from sympow_jax.input_pipeline.prepare.corpus import STDLIB_NAME, default_corpus
from sympow_jax.input_pipeline.store import Store, TokenStore, open_store
from sympow_jax.input_pipeline.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from sympow_jax.input_pipeline.views import ConcatView

__all__ = [
    "STDLIB_NAME",
    "BatchSource",
    "ConcatView",
    "Prefetch",
    "Store",
    "StoreError",
    "TokenStore",
    "Tokenizer",
    "TokenizerError",
    "default_corpus",
    "load_tokenizer",
    "make_batches",
    "open_batches",
    "open_data",
    "open_packed_store",
    "open_store",
    "prefetch",
]
