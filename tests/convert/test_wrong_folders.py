"""Folders that cannot be imported: one line says why, and nothing is written."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sympow_jax.command_line import one_line_errors
from sympow_jax.config import ConfigError
from sympow_jax.convert import __main__ as command
from sympow_jax.convert import safetensors
from sympow_jax.convert.exporting import export_workdir
from sympow_jax.convert.importing import import_folder, open_folder
from tests.convert.cases import change, make_folder


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return make_folder("llama_tied", tmp_path / "in")


def test_without_the_library_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"pip install 'sympow_jax\[hf\]'"):
        open_folder(str(folder))


def damage(folder: pathlib.Path, how: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "cut":
        file.write_bytes(content[:-4])
    elif how == "header":
        file.write_bytes(content[:40])
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "weights":
        file.unlink()
    elif how in ("absent", "outside"):
        file.rename(folder / "other.safetensors")
        name = {"absent": "model-1.safetensors", "outside": "../in/other.safetensors"}[how]
        (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, name)}))
    elif how == "extra":
        tensors = load_file(file)
        save_file(tensors | {"extra": np.ones(3, np.float32)}, file)
    else:
        name = "model.layers.1.mlp.up_proj.weight"
        if how == "missing":
            header["extra"] = header.pop(name)
        elif how == "shape":
            header[name]["shape"] = header[name]["shape"][::-1]
        elif how == "dtype":
            header[name]["dtype"] = "I32"
        elif how == "offsets":
            header[name]["data_offsets"][1] += 4
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", r"model\.safetensors: is no whole safetensors file \(.*file not fully covered\); fetch it again"),
        ("header", r"model\.safetensors: is no whole safetensors file \(.*header"),
        ("tokenizer", r"has no tokenizer\.json; make one with transformers"),
        ("weights", r"has neither model\.safetensors nor"),
        ("absent", r"model-1\.safetensors: does not exist, and model\.safetensors\.index\.json names it"),
        ("outside", r"names '\.\./in/other\.safetensors'; files must be in the same folder"),
        ("missing", r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight, which config\.json asks for"),
        ("extra", "extra has no place in this model"),
        ("shape", r"up_proj\.weight has shape \[32, 48\], and config\.json asks for \[48, 32\]"),
        ("dtype", r"up_proj\.weight is I32; only floating point numbers are read"),
        ("offsets", r"is no whole safetensors file \(.*invalid shape, data type, or offset for tensor\)"),
    ],
)
def test_a_folder_that_is_wrong_is_one_line_and_nothing_is_written(how, said, folder, tmp_path, capsys):
    damage(folder, how)
    assert one_line_errors(command.run, ["import", str(folder), f"--workdir={tmp_path / 'w'}"]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1, error
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "use `import FOLDER --workdir=W` or"),
        (["import", "--workdir=w"], "one folder and --workdir are needed"),
        (["import", "nowhere", "--workdir=w"], r"nowhere: has no config\.json"),
        (["export", "--workdir=w"], "--output is missing"),
        (["export", "--workdir=w", "--output=x", "--dtype=int8"], "--dtype = 'int8': choose one of float32, bfloat16"),
    ],
)
def test_wrong_arguments_are_one_line(argv, said, capsys):
    assert one_line_errors(command.run, argv) == 1
    assert re.search(said, capsys.readouterr().err)


def test_full_folders_unknown_kinds_and_tokens_beyond_the_embedding_are_refused(folder, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "x").touch()
    with pytest.raises(ConfigError, match=r"--workdir = .* is not empty"):
        import_folder(str(folder), str(tmp_path / "w"))
    with pytest.raises(ConfigError, match=r"--output = .* is not empty"):
        export_workdir("anywhere", str(tmp_path / "w"))
    change(folder, model_type="lama")
    with pytest.raises(ConfigError, match=r"model_type = 'lama': known are .*; did you mean 'llama'"):
        open_folder(str(folder))
    change(folder, model_type="llama", vocab_size=90)
    with pytest.raises(ConfigError, match=r"vocab_size = 90: the tokenizer beside it has 96 ids; legal are 96\.\."):
        open_folder(str(folder))
