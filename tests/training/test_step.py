"""What a step may never hold, what precision it keeps, and how often it is compiled."""

import io

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from sympow_jax.config import ConfigError
from sympow_jax.models.loss import token_nll
from sympow_jax.models.model import Model, resolve_implementation
from sympow_jax.training import checkpoint, heldout, loop, train_state
from sympow_jax.training.checkpoint import Checkpointer
from sympow_jax.training.manifest import CheckpointError
from sympow_jax.training.signals import EXIT_UNSAVED
from sympow_jax.training.step import make_train_step
from sympow_jax.training.train_state import create_train_state
from tests.models.small import VOCAB, tiny_config

T, V, E, BLOCK = 65_536, 50_304, 8, 8_192


def equations(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_the_logits_of_a_long_sequence_never_exist_at_once():
    """The largest array of loss and gradient at T = 65,536, V = 50,304 is one block's logits; so say the bytes."""

    def loss(hidden, kernel, targets):
        nll, log_z = token_nll(hidden, kernel, targets, block=BLOCK)
        return jnp.sum(nll + 1e-4 * log_z**2)

    shapes = [((1, T, E), jnp.bfloat16), ((E, V), jnp.float32), ((1, T), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = gradient.trace(*arguments).jaxpr
    sizes = [out.aval.size for equation in equations(program.jaxpr) for out in equation.outvars]
    assert max(sizes) == BLOCK * V
    memory = gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert memory < 3 * 4 * BLOCK * V < 4 * T * V / 2


def test_bfloat16_multiplies_in_bfloat16_keeps_float32_masters_and_donates_them():
    """Every projection and MLP product takes bfloat16; parameters, gradients, moments and the loss stay float32."""
    config = resolve_implementation(tiny_config("conformal_sympow", "model.dtype=bfloat16"))
    model = Model(config, VOCAB)
    step = make_train_step(model)
    state = jax.eval_shape(lambda: create_train_state(model, 0))
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        traced = step.trace(state, {"inputs": tokens, "targets": tokens})
    new_state, metrics = traced.out_info
    floats = [x.dtype for x in jax.tree.leaves((new_state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    products = [e for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    shapes = {tuple(v.aval.shape for v in e.invars): {v.aval.dtype for v in e.invars} for e in products}
    half = {jnp.dtype(jnp.bfloat16)}
    assert shapes[(48, 32), (32, 48)] == shapes[(48, 48), (48, 32)] == half  # up and down of the MLP
    donated = [info.donated for info in jax.tree.leaves(traced.lower().args_info)]
    assert sum(donated) == len(jax.tree.leaves(state)) == len(donated) - 2  # all but inputs and targets


def test_a_state_larger_than_the_machine_is_refused_before_it_is_made(monkeypatch):
    """2 layers' MLP of 10^10 units, 2 x 32 weights and a bias each, with Adam's moments in float32: 14,528.6 GiB."""
    memory = {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(train_state.os, "sysconf", memory.get)
    train_state.check_host_memory(Model(tiny_config("softmax_rope"), VOCAB))
    with pytest.raises(ConfigError, match=r"take 14,528\.6 GiB, and this machine has 3\.8 GiB; lower model\."):
        train_state.check_host_memory(Model(tiny_config("softmax_rope", "model.mlp_dim=10_000_000_000"), VOCAB))


@pytest.mark.slow
def test_a_run_compiles_its_step_once(tmp_path, monkeypatch):
    """Six steps with an evaluation, a checkpoint, accumulation and a traced step between them: one program each."""
    made = {}

    def remember(module, name):
        make = getattr(module, name)

        def wrapped(*args, **options):
            made[name] = make(*args, **options)
            return made[name]

        monkeypatch.setattr(module, name, wrapped)

    remember(loop, "train_steps")
    remember(heldout, "make_eval_step")
    flags = (
        "num_train_steps=6",
        "mesh.data=2",
        "data.batch_size=4",
        "optimizer.accumulation_steps=2",
        "evaluation.every_steps=3",
    )
    flags += (
        "evaluation.num_batches=2",
        "checkpoint.every_steps=2",
        "logging.every_steps=2",
        "logging.peak_flops=1e12",
    )
    config = tiny_config("conformal_sympow", *flags, "logging.profile_steps=5", "logging.tensorboard=false")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with jax.numpy_dtype_promotion("standard"):
        assert loop.train(config, str(tmp_path)) == 0
    assert made["train_steps"](1)._cache_size() == 1
    assert made["make_eval_step"]._cache_size() == 1
    assert list((tmp_path / "profile" / "5").rglob("*.xplane.pb"))
    assert not list((tmp_path / "profile").glob("[!5]*"))


@pytest.mark.slow
def test_a_run_that_could_not_save_says_so_by_its_exit_code(tmp_path, monkeypatch, capsys):
    """The save of step 2 fails, that of step 4 is made: the run ends with 3; had the last one failed, with an error."""
    flags = ("num_train_steps=4", "checkpoint.every_steps=2", "logging.peak_flops=1e12", "logging.tensorboard=false")
    config = tiny_config("conformal_sympow", *flags, "evaluation.num_batches=1", "mesh.data=1", "data.batch_size=2")
    check = Checkpointer._check_writable

    def full(self, step):
        if step in unwritable:
            raise OSError(24, "Too many open files")
        check(self, step)

    monkeypatch.setattr(Checkpointer, "_check_writable", full)
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", ())
    with jax.numpy_dtype_promotion("standard"):
        unwritable = (2,)
        assert loop.train(config, str(tmp_path / "a")) == EXIT_UNSAVED == 3
        unwritable = (2, 4)
        with pytest.raises(
            CheckpointError, match=r"saving step 4 .*Too many open files.*newest checkpoint on disk: none"
        ):
            loop.train(config, str(tmp_path / "b"))
    assert "not saved: steps [2] (the errors are above); on disk: steps [4]" in capsys.readouterr().out
