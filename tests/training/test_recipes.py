"""The recipes of the papers, run at a fraction of their size."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sympow_jax.config import ConfigError, parse_flags
from sympow_jax.training.metrics import read_metrics
from tests.models.small import ROOT

LC64 = f"--config={ROOT}/configs/lc64_124m.py:conformal_sympow,4096"


def test_a_reduced_recipe_is_the_recipe_at_other_sizes():
    whole, part = (parse_flags([LC64, *more]) for more in ([], ["--config.reduce=8", "--config.data.batch_size=3"]))
    assert (part.model.embed_dim, part.model.head_dim, part.model.mlp_dim) == (96, 8, 384)
    assert (part.data.seq_len, part.data.batch_size) == (512, 3)  # what is named stays as it is named
    assert part.evaluation.lengths == (128, 512, 2048, 8192) and part.attention.window == whole.attention.window // 8
    assert (part.model.num_layers, part.model.num_heads, part.optimizer) == (12, 12, whole.optimizer)
    twice = parse_flags([LC64, "--config.reduce=2", "--config.reduce=8", "--config.data.batch_size=3"])
    assert twice == part  # the last one counts, as of any flag
    for flag, message in (("reduce=7", "does not divide model.embed_dim = 768"), ("reduce=0", "must be at least 1")):
        with pytest.raises(ConfigError, match=message):
            parse_flags([LC64, f"--config.{flag}"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lc64_124m.py:conformal_sympow,4096", "fox_125m.py:fox", "based_360m.py:based"])
def test_a_reduced_recipe_trains(recipe, tmp_path):
    flags = ["reduce=16", "num_train_steps=3", "data.train=python-stdlib", "data.heldout=python-stdlib"]
    flags += ["optimizer.warmup_steps=1", "evaluation.num_batches=1", "logging.every_steps=1", "mesh.cpu_devices=1"]
    command = [sys.executable, "train.py", f"--config=configs/{recipe}", f"--workdir={tmp_path}/run"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
    done = subprocess.run([*command, *(f"--config.{flag}" for flag in flags)], cwd=ROOT, env=environment)
    assert done.returncode == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all() and abs(losses[0] - np.log(257)) < 1
