"""The package has one direction of imports, and importing it is light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sympow_jax"
LEVELS = {
    "typing": 0, "files": 0,
    "ops": 1, "sharding": 1, "config": 1, "variants": 1,
    "layers": 2, "input_pipeline": 2,
    "models": 3,
    "evals": 4,
    "training": 5,
    "loading": 6, "planning": 6, "generation": 6,
    "command_line": 7, "evaluation_request": 7,
    "evaluate": 8,
}  # fmt: skip
SIDEWAYS = {("config", "variants")}  # the config checks itself against the table
COMMANDS = {
    "convert",
    "eval",
    "generate",
    "inspect",
    "lm_eval",
    "plan",
    "prepare",
    "report",
    "sweep",
    "train",
    "verify_resume",
}  # above all, side by side


def imported_modules(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_edges() -> set[tuple[str, str]]:
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported_modules(path):
            parts = module.split(".")
            if (
                parts[0] == "sympow_jax"
                and len(parts) > 1
                and (PACKAGE / parts[1]).exists() | (PACKAGE / f"{parts[1]}.py").exists()
            ):
                edges.add((room, parts[1]))
    return edges


def violations(edges: set[tuple[str, str]]) -> list[str]:
    """Imports that go sideways or up; commands know the rooms and parts below them, and no other command."""
    levels = LEVELS | dict.fromkeys(COMMANDS, 1 + max(LEVELS.values()))
    found = []
    for room, imported in edges:
        if room in ("__init__", imported) or (room, imported) in SIDEWAYS:
            continue
        if room == "plots" or imported == "plots":
            allowed = room != "plots" and levels[room] >= LEVELS["evals"]
        else:
            allowed = levels[imported] < levels[room]
        found += [] if allowed else [f"{room} imports {imported}"]
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules == {*LEVELS, *COMMANDS, "plots", "__init__"}


def test_imports_go_one_way():
    assert violations(package_edges()) == []


@pytest.mark.parametrize(
    ("room", "imported"),
    [("sweep", "train"), ("evaluate", "eval"), ("ops", "layers"), ("plots", "files"), ("models", "plots")],
)
def test_an_import_the_other_way_is_named(room, imported):
    assert violations(package_edges() | {(room, imported)}) == [f"{room} imports {imported}"]


def test_ops_know_neither_flax_nor_config():
    for path in (PACKAGE / "ops").rglob("*.py"):
        modules = imported_modules(path)
        assert not any(module.split(".")[0] in ("flax", "ml_collections") for module in modules), path
        assert not any(module.startswith("sympow_jax.config") for module in modules), path


def test_plots_do_not_import_jax():
    for path in (PACKAGE / "plots").rglob("*.py"):
        assert not any(module.split(".")[0] == "jax" for module in imported_modules(path)), path


def test_only_config_knows_ml_collections():
    users = [p for p in PACKAGE.rglob("*.py") if any(m.startswith("ml_collections") for m in imported_modules(p))]
    assert [str(path.relative_to(PACKAGE)) for path in sorted(users)] == ["config/files.py", "config/resolve.py"]


def test_importing_everything_needs_no_tensorflow_torch_or_clu():
    code = "import sys, sympow_jax.train, sympow_jax.eval\n"
    code += "print({'tensorflow', 'torch', 'clu'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stdout + done.stderr


LIGHT = """
import sys
from sympow_jax import train
from sympow_jax.command_line import one_line_errors

for flags in (["--list"], ["--confg=quickstart"], ["--config=quickstart:fxo"], ["--config=quickstart", "--workdir"],
              ["--config=quickstart", "--config.data.seq_length=3"], ["--config=quickstart"],
              ["--config=quickstart", "--workdir=W", "--config.data.seq_len=-3"]):
    one_line_errors(train.run, flags)
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (LIGHT, "numpy jax flax optax orbax grain tensorstore scipy matplotlib tensorflow_datasets transformers"),
        ("import sys, sympow_jax.training.loop", "scipy matplotlib tensorflow_datasets transformers tensorboardX"),
        ("import sys, sympow_jax.evaluate", "grain scipy tensorflow_datasets transformers tensorboardX"),
        ("import sys, sympow_jax.generate", "grain scipy matplotlib tensorflow_datasets transformers tensorboardX"),
    ],
    ids=["a list and errors of flags", "a training run", "an evaluation", "generation"],
)
def test_what_is_slow_to_import_is_imported_where_it_is_used(code, absent):
    code += f"\nprint('imported:', *sorted({{*{absent.split()}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported:", done.stdout + done.stderr
    assert done.stderr.count("error: ") == 6 * (code.startswith(LIGHT)), done.stderr
