"""Every command that takes a workdir takes an imported one."""

import json
import re

import jax
import numpy as np
import pytest

from sympow_jax import eval as eval_command
from sympow_jax import generate, inspect, prepare, report, train
from sympow_jax.command_line import one_line_errors
from sympow_jax.convert.importing import import_folder
from tests.convert.cases import make_folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with an imported workdir, w, and a store of its tokens, c."""
    folder = tmp_path_factory.mktemp("imported")
    import_folder(str(make_folder("llama_yarn", folder / "in")), str(folder / "w"))
    rng = np.random.default_rng(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(f"t{i}" for i in rng.integers(3, 96, 300)))
    made = [f"--output={folder / 'c'}", f"--tokenizer={folder / 'w' / 'tokenizer'}", "--document_length=256"]
    assert prepare.run(["text", str(folder / "?.txt"), *made, "--heldout_fraction=0.5"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.quick
def test_it_is_evaluated_generated_from_inspected_and_reported(imported, capsys):
    workdir = f"--workdir={imported / 'w'}"
    lengths = ["--lengths=64,256", "--num_documents=2"]
    assert eval_command.run([workdir, f"--data={imported / 'c'}", *lengths]) == 0
    result = json.loads((imported / "w" / "eval" / "length_generalisation.json").read_text())
    assert [row["length"] for row in result["lengths"]] == [64, 256] and result["step"] == 0
    assert generate.run([workdir, "--prompt=t5 t6", "--max_new_tokens=5", "--temperature=0"]) == 0
    assert generate.run([workdir, "--prompt=t5 t6 t7 t8", "--check"]) == 0
    assert inspect.run([workdir]) == 0
    assert report.run([str(imported / "w"), f"--output={imported / 'r.html'}"]) == 0
    assert re.search(r"softmax_rope: kernel softmax", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.quick
def test_another_tokenizers_text_is_refused_and_a_new_run_starts_from_it(imported, capsys):
    config = json.loads((imported / "w" / "config.json").read_text())
    assert one_line_errors(eval_command.run, [f"--workdir={imported / 'w'}"]) == 1
    assert "make a store of the text with prepare.py --tokenizer=" in capsys.readouterr().err
    shape = {f"model.{name}": config["model"][name] for name in config["model"] if name not in ("dtype", "remat")}
    flags = [f"--config.{name}={value}" for name, value in shape.items()] + [
        f"--config.data.{split}={imported / 'c'}" for split in ("train", "heldout")
    ]
    small = (
        "num_train_steps=1 mesh.data=1 data.seq_len=64 data.batch_size=1 evaluation.lengths=64 evaluation.num_batches=1"
    )
    flags += [f"--config.{flag}" for flag in small.split()]
    new = ["--config=quickstart:softmax_rope", f"--workdir={imported / 'new'}", f"--init_from={imported / 'w'}"]
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        assert train.run([*new, *flags]) == 0
    assert "starts from 21 of 21 parameters" in capsys.readouterr().out
    on = ["--config=quickstart:softmax_rope", f"--workdir={imported / 'w'}"]
    assert one_line_errors(train.run, [*on, *flags]) == 1
    assert "differs from the run in" in capsys.readouterr().err
