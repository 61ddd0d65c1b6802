"""README says what the code says."""

import pathlib
import re
import subprocess

from sympow_jax import variants

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_variants_table_is_the_one_that_the_code_makes():
    assert variants.markdown_table() in README


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_config_key_is_explained():
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    keys = [line for line in lines if re.match(r"    [a-z]\.\w+ = ", line) and not re.search(r" = \w+\(\)", line)]
    plain = {"variant", "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "tied_embeddings", "seq_len"}
    named = {"prefetch_batches", "num_threads", "learning_rate", "warmup_steps", "b1", "b2", "eps", "every_steps"}
    for line in keys:
        name = line.split(" = ")[0].split(".")[1]
        assert "#" in line or name in plain | named | {"keep_last", "tensorboard"}, line


def test_launch_scripts_are_valid_shell():
    for script in sorted((ROOT / "docs" / "launch").glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script
        assert "set -euo pipefail" in script.read_text(), script


def test_the_container_copies_files_that_exist_and_names_extras_that_exist():
    text = (ROOT / "docs" / "launch" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"requirements.txt", "sympow_jax", "configs"} <= {*copied}
    for name in copied:
        assert (ROOT / name).exists(), name
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"EXTRA=(\w+)", text):
        assert f"\n{extra} = [" in project, extra


def test_the_tree_names_everything_at_the_top_of_the_package():
    tree = README.partition("## The tree")[2].partition("## ")[0]
    for path in (ROOT / "sympow_jax").iterdir():
        name = path.name + ("/" if path.is_dir() else "")
        assert name.startswith("__pycache__") or re.search(rf"(?m)^      .*{re.escape(name)}", tree), name
