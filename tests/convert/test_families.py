"""Every family: the logits of transformers, and a way back without loss."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sympow_jax.convert.exporting import export_workdir
from sympow_jax.convert.importing import import_folder
from sympow_jax.loading import load
from tests.convert.cases import CASES, GOLDEN, make_folder

TOLERANCE, FAR_TOLERANCE = 3e-4, 2e-4  # of logits with a root mean square of 3


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(np.array_equal(a, b)), one, other))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_and_the_way_back_is_exact(case, tmp_path):
    import_folder(str(make_folder(case, tmp_path / "in")), str(tmp_path / "w"))
    model, params, tokenizer = load(str(tmp_path / "w"))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (2,))
    golden = np.load(GOLDEN / case / "logits.npz")
    lengths = [(64, slice(None), TOLERANCE), (300, golden["rows_300"], TOLERANCE)]
    lengths += [(2048, slice(-16, None), FAR_TOLERANCE)] if "tokens_2048" in golden else []
    for length, rows, tolerance in lengths:
        logits, _ = model.logits(params, jnp.asarray(golden[f"tokens_{length}"])[None])
        ours, theirs = np.asarray(logits)[0][rows], golden[f"logits_{length}"]
        assert 1.6 < np.sqrt((theirs**2).mean()) < 5
        assert np.abs(ours - theirs).max() <= tolerance
        assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))

    name = export_workdir(str(tmp_path / "w"), str(tmp_path / "out"))
    own = json.loads((GOLDEN / case / "config.json").read_text())
    assert name == own["architectures"][0]
    import_folder(str(tmp_path / "out"), str(tmp_path / "again"))
    again, params_again, tokenizer_again = load(str(tmp_path / "again"))
    assert same(params, params_again) and again.config == model.config
    assert tokenizer_again.digest == tokenizer.digest
    assert tensors(tmp_path / "in") == tensors(tmp_path / "out")


def tensors(folder: pathlib.Path) -> dict[str, list[int]]:
    """Names and shapes in a file, by the format's definition."""
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - int.from_bytes(
        content[:8], "little"
    )
    return {
        name: entry["shape"] for name, entry in header.items() if math.prod(entry["shape"]) and entry["dtype"] == "F32"
    }
