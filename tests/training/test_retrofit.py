"""attention.blend_steps and optimizer.distill_*: a power model that grows out of a softmax model and learns from it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.config import ConfigError, override
from sympow_jax.models.model import Features, Model
from sympow_jax.training import loop
from sympow_jax.training.checkpoint import Checkpointer, CheckpointError
from sympow_jax.training.config_mesh import config_mesh
from sympow_jax.training.initial_weights import RECORD, plan_initial_weights
from sympow_jax.training.metrics import METRICS_NAME, read_metrics
from sympow_jax.training.objective import Teacher, layer_distances
from sympow_jax.training.step import make_train_step, train_steps
from sympow_jax.training.teacher import load_teacher
from sympow_jax.training.train_state import create_train_state
from tests.models.small import VOCAB, moved, tiny_config

BLEND = ("attention.blend_from=softmax_rope", "attention.blend_steps=2")
DISTIL = ("optimizer.distill_layers=0.5", "optimizer.distill_logits=2")
SMALL = ("model.num_layers=1", "data.seq_len=16", "evaluation.lengths=16", "attention.implementation=blockwise")
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 16), np.int32)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def pair(variant, *flags, scale=0.3):
    """The original and its parameters, the new model, and parameters of its own with those of the original."""
    old = Model(tiny_config("softmax_rope", *SMALL, *flags), VOCAB)
    new = Model(tiny_config(variant, *SMALL, *BLEND, *flags), VOCAB)
    before = drawn(old, scale)
    return old, before, new, merge(drawn(new, scale), before)


def drawn(model, scale):
    """Random parameters, made without a compiler; scales of norms are about 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    begin = lambda path, x: np.full(x.shape, float(path[-1].key == "scale"), np.float32)  # noqa: E731
    return moved(jax.tree_util.tree_map_with_path(begin, shapes), scale)


def merge(own, others):
    return {k: merge(v, others.get(k, {})) if isinstance(v, dict) else others.get(k, v) for k, v in own.items()}


@pytest.mark.parametrize("variant", ["sympow_gated", "conformal_sympow", "conformal_vector_sympow"])
def test_at_share_1_logits_are_the_originals_bit_for_bit_and_at_0_the_models_own(variant):
    old, before, new, params = pair(variant)
    blended = jax.jit(lambda params, share: new.features(params, TOKENS, softmax_share=share).hidden)
    original = jax.jit(lambda params: old.features(params, TOKENS).hidden)(before)
    alone = jax.jit(lambda params: new.features(params, TOKENS).hidden)(params)
    np.testing.assert_array_equal(blended(params, jnp.float32(1)), original)
    np.testing.assert_allclose(blended(params, jnp.float32(0)), alone, atol=1e-6)
    assert jnp.max(jnp.abs(original - alone)) > 0.1


def test_layer_distances_and_divergences_are_those_of_the_formula():
    rng = np.random.default_rng(1)
    mine, others = (jnp.asarray(rng.standard_normal((3, 2, 5, 4)), jnp.float32) for _ in range(2))
    features, original = (Features(jnp.zeros(()), jnp.zeros(()), (x[:1], x[1:])) for x in (mine, others))
    want = np.mean(np.sum((mine - others) ** 2, -1) / np.sum(others**2, -1), axis=0)
    np.testing.assert_allclose(layer_distances(features, original), want, rtol=1e-5)
    kernels = [jnp.asarray(rng.standard_normal((4, 7)), jnp.float32) for _ in range(2)]
    one, two = (Features(x[0], w, ()) for x, w in zip((mine, others), kernels, strict=True))
    log_q, log_p = (jax.nn.log_softmax(0.5 * x[0] @ w) for x, w in zip((mine, others), kernels, strict=True))
    want = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    for block in (3, 100):
        model = Model(tiny_config("sympow", "model.logit_scale=0.5", f"model.loss_block={block}"), VOCAB)
        np.testing.assert_allclose(model.divergence(one, two), want, rtol=1e-4, atol=1e-6)


def test_the_softmax_is_in_the_steps_of_the_blend_alone_and_in_no_stream():
    new = Model(tiny_config("sympow", *SMALL, *BLEND), VOCAB)
    step = train_steps(new)
    assert step(1) is step(2) and step(3) is step(4) and step(2) is not step(3)
    state, batch = jax.eval_shape(lambda: create_train_state(new, 0)), {"inputs": TOKENS, "targets": TOKENS}
    assert "softmax_share" in jax.eval_shape(step(2), state, batch)[1]
    assert new.streams_constant and "keys" not in str(jax.eval_shape(lambda: new.initial_state(1, 64)))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The workdir of a softmax model of the data's vocabulary, at step 0."""
    workdir = tmp_path_factory.mktemp("runs") / "original"
    model = Model(override(tiny_config("softmax_rope", *SMALL), {"model.num_layers": 2}), 257)
    params = jax.tree.map(jnp.asarray, drawn(model, 0.1))
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(0, {"params": params}, metadata={})
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    (workdir / "data.json").write_text(json.dumps({"tokenizer_digest": "bytes", "vocab_size": 257}))
    return workdir


def test_a_teacher_is_what_the_run_started_from_or_an_error(original, tmp_path):
    def model(*flags, layers=2):
        return Model(override(tiny_config("sympow", *SMALL, *flags), {"model.num_layers": layers}), 257)

    assert load_teacher(model(), str(tmp_path), None) is None
    with pytest.raises(ConfigError, match=r"optimizer.distill_layers = 0.5: there is no original to learn from"):
        load_teacher(model(*DISTIL), str(tmp_path), None)
    plan = lambda m: plan_initial_weights(str(original), str(tmp_path), m, "bytes", has_checkpoints=False)  # noqa: E731
    plan(model()).record(str(tmp_path))
    with pytest.raises(ConfigError, match=r"has model.num_layers = 2, and this model 1"):
        load_teacher(model(*DISTIL, layers=1), str(tmp_path), None)
    teacher = load_teacher(model(*DISTIL), str(tmp_path), None)
    assert teacher is not None and teacher.model.config.variant == "softmax_rope"
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(record | {"digest": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"step 0 is not what the run in .* started from"):
        load_teacher(model(*DISTIL), str(tmp_path), None)


@pytest.mark.slow
def test_a_retrofit_resumes_bit_for_bit_in_its_blend_and_after_it(original, tmp_path):
    """Stopped after steps 1 and 3 of 4, the flag of the original given once."""
    flags = (*SMALL, *BLEND, *DISTIL, "mesh.data=2", "model.num_layers=2", "data.batch_size=2", "logging.every_steps=1")
    flags += ("evaluation.num_batches=1", "logging.peak_flops=1e12", "logging.tensorboard=false")
    flags += ("optimizer.schedule=constant", "optimizer.freeze=layers/*/mlp/*", "optimizer.learning_rates=*query*=1e-2")
    config = tiny_config("conformal_sympow", *flags)

    def run(folder, *ends):
        for end in ends:
            initial = {"init_from": str(original), "init_from_allow": "*"} if end == ends[0] else {}
            changed = dataclasses.replace(config, num_train_steps=end)
            assert loop.train(changed, str(folder), **initial) == 0
        rows = [row for row in read_metrics(folder / METRICS_NAME) if "loss" in row]
        with Checkpointer(folder / "checkpoints", read_only=True) as checkpointer:
            return rows, checkpointer.digest(4), checkpointer.describe(4)[0]

    straight, digest, arrays = run(tmp_path / "straight", 4)
    stopped, again, _ = run(tmp_path / "stopped", 1, 3, 4)
    names = ("loss", "distill_layers", "distill_logits", "softmax_share", "grad_norm")
    assert [[row.get(name) for name in names] for row in stopped] == [[r.get(name) for name in names] for r in straight]
    assert digest == again and [row.get("softmax_share") for row in straight] == [1.0, 0.5, None, None]
    assert straight[0]["distill_layers"] < 1e-9 < 1e-4 < straight[2]["distill_layers"]
    assert not [name for name in arrays if name.startswith("opt_state") and "/mlp/" in name]


@pytest.mark.slow
def test_a_mesh_has_the_losses_of_one_device():
    def losses(*flags):
        old, before, new, params = pair("conformal_sympow", *DISTIL, *flags, scale=0.1)
        config = override(new.config, {"data.batch_size": 4, "mesh.data": 1} if not flags else {"data.batch_size": 4})
        mesh = config_mesh(config)
        new, old = Model(config, VOCAB, mesh), Model(old.config, VOCAB, mesh)
        state = dataclasses.replace(create_train_state(new, 0), params=jax.tree.map(jnp.asarray, params))
        batch = {"inputs": np.tile(TOKENS, (2, 1)), "targets": np.tile(TOKENS[:, ::-1], (2, 1))}
        step = make_train_step(new, Teacher(old, before), blends=True)
        found = []
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append([float(metrics[n]) for n in ("loss", "distill_layers", "distill_logits", "grad_norm")])
        return found

    mesh = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.seq=2")
    np.testing.assert_allclose(losses(*mesh), losses(), rtol=1e-4, atol=1e-6)
