"""A new position encoding and a new kernel touch the files that CONTRIBUTING.md names, and no others."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.models.small import ROOT

# file -> (text there, text in its place): what a contributor would write
POSITION = {
    "sympow_jax/ops/positions/biases.py": (
        "\ndef kerple_log(",
        '''
def root(distance: Float[Array, "*shape"], *, strength: Float[Array, "H"]) -> Float[Array, "H *shape"]:
    """A toy: -strength_h sqrt(distance)."""
    distance = jnp.maximum(jnp.asarray(distance, strength.dtype), 0)
    return -strength.reshape((-1,) + (1,) * distance.ndim) * jnp.sqrt(distance)[None]


def kerple_log(''',
    ),
    "sympow_jax/ops/positions/bias_functions.py": (
        "\n_LEARNED = {\n",
        """
def _init_root(key, num_heads):
    return {"strength": jax.random.uniform(key, (num_heads,), jnp.float32)}


def _root(params, q_positions, k_positions):
    from sympow_jax.ops.positions.biases import root

    return root(_distance(q_positions, k_positions), strength=params["strength"])


_LEARNED = {
    "root": (_init_root, _root),
""",
    ),
    "sympow_jax/variants.py": [
        ('BIAS_POSITIONS = ("alibi"', 'BIAS_POSITIONS = ("root", "alibi"'),
        ('LEARNED_BIASES = ("kerple_log"', 'LEARNED_BIASES = ("root", "kerple_log"'),
        ("_ROWS = (\n", '_ROWS = (\n    Variant("softmax_root", "softmax", "root", "none", "a toy"),\n'),
    ],
}
KERNEL = {
    "sympow_jax/ops/linear_attention/kernels.py": [
        (
            "\ndef _integer_power(",
            '''
@dataclasses.dataclass(frozen=True)
class BumpKernel:
    """A toy: kernel(s) = 1 + s^2."""

    def weight(self, s):
        """The kernel as a function of the score."""
        return 1.0 + s * s

    def derivative(self, s):
        """The derivative of `weight`."""
        return 2.0 * s

    def features(self, x):
        """phi(x) = [1, phi_2(x)]."""
        return jnp.concatenate([jnp.ones_like(x[..., :1, :]), _squares(x)], axis=-2)

    def num_features(self, head_dim):
        """P, the size of phi."""
        return 1 + head_dim * (head_dim + 1) // 2


def _integer_power(''',
        ),
    ],
    "sympow_jax/layers/kernels.py": [
        ('"taylor": TaylorKernel(),', '"taylor": TaylorKernel(), "bump": BumpKernel(),'),
        ("import Kernel,", "import BumpKernel, Kernel,"),
    ],
    "sympow_jax/variants.py": [
        ('KERNELS = ("softmax", "power", ', 'KERNELS = ("softmax", "bump", "power", '),
        ('LINEAR_KERNELS = ("power", ', 'LINEAR_KERNELS = ("bump", "power", '),
        ("_ROWS = (\n", '_ROWS = (\n    Variant("bump_gated", "bump", "rope", "data", "a toy"),\n'),
        ('    "taylor": ("2 H P', '    "bump": ("2 H P (Dv + 1)", "K P (Dv + 1)"),\n    "taylor": ("2 H P'),
    ],
}
# trains a step of the new variant, compares its fast form with the dense one, and a stream with one pass
TRY = """
import sys
import jax, jax.numpy as jnp, numpy as np
from sympow_jax.config import override
from sympow_jax.models.model import Model, resolve_implementation
from tests.models.small import tiny_config

jax.config.update("jax_disable_most_optimizations", True)
config = override(resolve_implementation(tiny_config(sys.argv[1])), {"attention.chunk_size": 10})
x = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
params = Model(config, 61).init(jax.random.key(0))
params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)


def loss_and_grads(form):
    model = Model(override(config, {"attention.implementation": form}), 61)
    return jax.jit(jax.value_and_grad(lambda p: model.nll(p, x, x)[0].mean()))(params)


want, want_grads = loss_and_grads("reference")
found, grads = loss_and_grads(sys.argv[2])
np.testing.assert_allclose(found, want, rtol=1e-5)
for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
    assert np.linalg.norm(a - b) < 2e-3 * max(np.linalg.norm(b), 1e-3)
model, state, parts = Model(config, 61), Model(config, 61).initial_state(2, 24), []
for tokens in np.split(x, (10, 11), axis=1):
    part, state = jax.jit(model.logits)(params, tokens, state=state)
    parts.append(part)
np.testing.assert_allclose(np.concatenate(parts, 1), model.logits(params, x)[0], rtol=2e-4, atol=2e-4)
after = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
assert model.nll(after, x, x)[0].mean() < found
"""


def named_files(section: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(rf"## {section}\n(.*?)\n## ", text, re.DOTALL)[1]


def edit(root: pathlib.Path, changes: dict) -> None:
    for name, pairs in changes.items():
        path = root / name
        text = path.read_text()
        for old, new in [pairs] if isinstance(pairs, tuple) else pairs:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "changes", "variant", "form"),
    [
        ("Add a position encoding", POSITION, "softmax_root", "blockwise"),
        ("Add a kernel", KERNEL, "bump_gated", "chunked"),
    ],
)
def test_only_the_named_files_change(tmp_path, section, changes, variant, form):
    for name in ("sympow_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tests" / "models", tmp_path / "tests" / "models")
    names = [pathlib.Path(name).name for name in changes]
    edit(tmp_path, changes)
    for name in names:
        assert name in named_files(section), f"CONTRIBUTING.md does not name {name}"
    subprocess.run([sys.executable, "-c", TRY, variant, form], cwd=tmp_path, check=True, timeout=300)
