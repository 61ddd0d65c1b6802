"""configs/scale: every size and context resolves, has its parameters, and fits its meshes; a narrow twin trains."""

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from sympow_jax import sharding
from sympow_jax.config import Config, ConfigError, parse_flags
from sympow_jax.input_pipeline.tokenizers import IdTokenizer
from sympow_jax.models.model import Model
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from tests.models.small import ROOT
from tests.training.test_faults import plain_environment

SIZES = {"1.3b": 1.35e9, "7b": 6.7e9, "14b": 14.5e9}


def config_of(argument: str, *flags: str) -> Config:
    return parse_flags([f"--config={ROOT}/configs/scale/large.py:{argument}", *flags])


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_its_parameters_and_a_context_its_mesh(size):
    config = config_of(f"{size},65536")
    params = jax.eval_shape(Model(config, config.model.vocab_size).init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == pytest.approx(SIZES[size], rel=0.01)
    for context, axes in ((65_536, (1, 64, 1, 4)), (1_048_576, (1, 4, 1, 64))):
        config = config_of(f"{size},{context},softmax_rope")
        assert (config.data.seq_len, config.data.seq_len * config.data.batch_size) == (context, 4_194_304)
        assert tuple(sharding.infer_sizes(dataclasses.asdict(config.mesh), 256).values()) == axes
    with pytest.raises(ConfigError, match=r"no size '3b'; choose one of 1\.3b, 7b, 14b"):
        config_of("3b,65536")


@pytest.mark.slow
def test_a_twin_of_a_sixteenth_of_the_width_trains_on_eight_devices(tmp_path):
    """All 24 layers, heads and 128,256 tokens of 1.3b, with ids of 32 bits from a file."""
    tokens = np.arange(1 << 15, dtype=np.int32) * 7 % 128_256
    np.save(tmp_path / "tokens.npy", tokens)
    IdTokenizer(128_256).save(tmp_path / "tokenizer")
    ids = str(tmp_path / "tokens.npy")
    changes = {
        "model.embed_dim": 128, "model.head_dim": 8, "model.mlp_dim": 352, "data.train": ids, "data.heldout": ids,
        "data.seq_len": 32, "data.batch_size": 4, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.seq": 2,
        "num_train_steps": 20, "optimizer.warmup_steps": 1, "evaluation.num_batches": 1, "evaluation.lengths": 32,
        "logging.every_steps": 1, "logging.peak_flops": 1e12,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    command = [sys.executable, "train.py", "--config=configs/scale/large.py:1.3b,65536", *flags]
    environment = plain_environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    result = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_NAME) if "loss" in row]
    assert len(losses) == 20 and max(abs(loss - np.log(128_256)) for loss in losses) < 0.2  # each id is seen once
