"""The recipes of the papers at a fraction of their size."""

import pytest

from sympow_jax.config import ConfigError, parse_flags
from tests.models.small import ROOT

LC64 = f"--config={ROOT}/configs/lc64_124m.py:conformal_sympow,4096"


def test_a_reduced_recipe_is_the_recipe_at_other_sizes():
    whole, part = (parse_flags([LC64, *more]) for more in ([], ["--config.reduce=8", "--config.data.batch_size=3"]))
    assert (part.model.embed_dim, part.model.head_dim, part.model.mlp_dim) == (96, 8, 384)
    assert (part.data.seq_len, part.data.batch_size) == (512, 3)  # what is named stays as it is named
    assert part.evaluation.lengths == (128, 512, 2048, 8192) and part.attention.window == whole.attention.window // 8
    assert (part.model.num_layers, part.model.num_heads, part.optimizer) == (12, 12, whole.optimizer)
    for flag, message in (("reduce=7", "does not divide model.embed_dim = 768"), ("reduce=0", "must be at least 1")):
        with pytest.raises(ConfigError, match=message):
            parse_flags([LC64, f"--config.{flag}"])
