"""The checkpoints of tests/golden/hf as folders that can be imported."""

import json
import pathlib
import shutil

import tokenizers

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "hf"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def make_folder(case: str, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a case with a tokenizer of its 96 tokens, t0 (BOS) to t95 (t1: what is unknown, t2: EOS)."""
    shutil.copytree(GOLDEN / case, folder)
    words = {f"t{number}": number for number in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t0", "eos_token": "t2"}))
    return folder


def change(folder: pathlib.Path, **values: object) -> None:
    """Changes keys of config.json; a value of ... takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
