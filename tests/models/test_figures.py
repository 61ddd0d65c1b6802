"""Every file of configs/figures builds at full size, and says what it runs and what is known of it."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from sympow_jax.config import TASKS, load_file, parse_flags
from sympow_jax.input_pipeline.tasks.task_store import make_task
from sympow_jax.models.model import Model, resolve_implementation

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "configs" / "figures").glob("*.py") if path.name != "__init__.py")
OTHERS = {
    "mqar_zoology": ("softmax_rope", "based", "rebased"),
    "mqar_based": ("softmax_rope", "based,8"),
    "mqar_rebased": ("based,128", "softmax_absolute,64"),
    "sympow_relative_loss": ("softmax_rope", "sympow,6"),
    "conformal_contextwise": ("sympow_gated",),
    "fox_per_token_loss": ("softmax_rope",),
    "conformal_family": ("none,none", "learned,rope", "scalar,scalar", "fixed,frequency"),
    "state_passing": ("sympow_gated,noise", "softmax_rope,zero"),
    "state_recall": ("window,window=8", "sympow_p4,head_dim=12", "rebased,feature_dim=4"),
}
CASES = [f"{path.stem}.py" for path in FILES]
CASES += [f"{name}.py:{argument}" for name, arguments in OTHERS.items() for argument in arguments]


@pytest.mark.parametrize("case", CASES)
def test_a_figure_builds_at_full_size(case):
    config = resolve_implementation(parse_flags([f"--config={ROOT}/configs/figures/{case}"]))
    name, length = config.data.train, config.data.seq_len
    vocab_size = make_task(name, length, config.task).vocab_size if name in TASKS else 50_257
    model = Model(config, vocab_size)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix dtypes
        params = jax.eval_shape(model.init, jax.random.key(0))
        nll, _ = jax.eval_shape(model.nll, params, tokens, tokens)
    assert nll.shape == (1, length)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_figure_states_its_command_budget_and_findings(path):
    text = load_file(str(path)).__doc__
    assert f"--config=configs/figures/{path.name}" in text
    for word in ("Budget: ", "Paper", "Found"):
        assert word in text, word
    assert (
        "not run" in text or any(character.isdigit() for character in text[text.index("Found") :]) or "RESULTS" in text
    )
