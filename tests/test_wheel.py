"""The wheel works where there is no clone: console commands, config files by name, everything it reads inside it."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
    "--config=quickstart:conformal_sympow", "--config.num_train_steps=4", "--config.model.num_layers=1",
    "--config.data.seq_len=64", "--config.data.batch_size=2", "--config.evaluation.num_batches=1",
    "--config.evaluation.lengths=64,128", "--config.evaluation.num_documents=2", "--config.logging.tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from this tree as pip builds it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_configs(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("sympow_jax", "sympow_jax"), ("configs", "sympow_jax/configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{place}/{path.relative_to(ROOT / folder).as_posix()}" in inside, path
    tops = {name.partition("/")[0] for name in inside}
    assert all(top == "sympow_jax" or top.endswith(".dist-info") for top in tops), tops


@pytest.mark.slow
def test_an_installed_wheel_trains_and_evaluates_in_an_empty_folder(wheel, tmp_path):
    """A fresh environment over the packages of this one; its own sympow_jax comes first, and no clone is beside it."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    packages = next(path for path in map(pathlib.Path, sys.path) if (path / "jax").is_dir())
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = pathlib.Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=120
    )
    (site / "dependencies.pth").write_text(f"{packages}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")} | {"JAX_PLATFORMS": "cpu"}

    def run(command: str, *flags: str) -> str:
        done = subprocess.run(
            [environment / "bin" / command, *flags], cwd=empty, env=outside, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (empty / "a.txt").write_text("some text\n" * 100)
    run("sympow-data", "text", "a.txt", "--output=corpus", "--document_length=64", "--documents=split")
    listed = run("sympow-train", "--list")
    assert "figures/mqar_zoology" in listed and str(ROOT) not in listed
    assert "at 64" in run("sympow-train", *SMALL, "--workdir=run") or (empty / "run" / "config.json").is_file()
    run("sympow-eval", "--workdir=run")
    assert (empty / "run" / "eval" / "length_generalisation.png").is_file()
    assert "embedding" in run("sympow-inspect", "--workdir=run")
    run("sympow-report", "run")
    assert "h100" in run("sympow-plan", "--list")  # the GPU descriptions are inside
