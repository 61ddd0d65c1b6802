import numpy as np
import pytest

from sympow_jax.input_pipeline import open_store
from sympow_jax.input_pipeline import tokenizers as tk
from sympow_jax.input_pipeline.views import BinStore
from tests.input_pipeline.stores import write_store

TEXT = 'def f():\n\treturn "naïve 😀 \\ / end"\r\n'


def test_bytes_round_trip():
    tokenizer = tk.load_tokenizer("byte")
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == TEXT
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-json"])
def test_gpt2_round_trip_save_and_load(name, gpt2_folder, tmp_path):
    tokenizer = tk.load_tokenizer(f"{name}:{gpt2_folder}")
    ids = tokenizer.encode(TEXT)
    assert 256 in ids.tolist() and ids.dtype == np.uint16
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save(tmp_path / "saved")
    loaded = tk.load_tokenizer(tmp_path / "saved")
    assert loaded.digest == tokenizer.digest
    assert loaded.encode(TEXT).tolist() == ids.tolist()


def test_json_escape_is_that_of_longcrawl64(gpt2_folder):
    plain, escaped = (tk.load_tokenizer(f"{name}:{gpt2_folder}") for name in ("gpt2", "gpt2-json"))
    assert plain.decode(escaped.encode("a\n“😀")) == "a\\n\\u201c\\ud83d\\ude00"
    # a window may cut an escape, or a surrogate pair, in two
    assert escaped.decode(escaped.encode("x\né")[:-2]) == "x\n\\u00"
    assert escaped.decode(plain.encode("\\ud83d")) == "�"


def test_two_files_in_a_store_of_longcrawl64_are_its_tokenizer(gpt2_folder, tmp_path):
    """Without a network: vocab.bpe and encoder.json in tokenizer/, in a store or beside a .bin."""
    tokens = np.array([[256, 10, 256, 11]], "<u2")
    path = write_store(tmp_path / "a.zarr", tokens, chunks=(1, 4), manifest=False)
    (path / ".zattrs").unlink()  # LongCrawl64's own say nothing that is needed
    tokens.tofile(tmp_path / "a.bin")
    for folder in (path / "tokenizer", tmp_path / "tokenizer"):
        folder.mkdir()
        for name in tk.GPT2_HASHES:
            (folder / name).write_bytes((gpt2_folder / name).read_bytes())
    assert open_store(str(path)).tokenizer.spec == {"kind": "gpt2", "json_escape": True}
    assert BinStore(str(tmp_path / "a.bin")).tokenizer.spec == {"kind": "gpt2", "json_escape": False}


def test_gpt2_vocabulary_is_checked(gpt2_folder):
    (gpt2_folder / "vocab.bpe").write_bytes(b"#version: 0.2\n")
    with pytest.raises(tk.TokenizerError, match=r"vocab\.bpe has sha256 \w+, not GPT-2's"):
        tk.load_tokenizer(f"gpt2:{gpt2_folder}")
    (gpt2_folder / "vocab.bpe").unlink()
    with pytest.raises(tk.TokenizerError, match=r"vocab\.bpe is missing"):
        tk.load_tokenizer(f"gpt2:{gpt2_folder}")


def test_trained_bpe_and_tokenizer_json(tmp_path):
    tokenizer = tk.train_bpe([TEXT * 5, "other words " * 50], vocab_size=280)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (280, 0)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    path = tmp_path / "mine.json"
    path.write_bytes(tokenizer.vocabulary_files()["tokenizer.json"])
    assert tk.load_tokenizer(path).digest == tokenizer.digest
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(tk.TokenizerError, match=r"tokenizer\.json: sha256"):
        tk.load_tokenizer(tmp_path / "saved")
    path.write_text("{}")
    with pytest.raises(tk.TokenizerError, match="not a Hugging Face tokenizer"):
        tk.load_tokenizer(path)


def test_unknown_name_says_what_is_legal():
    with pytest.raises(tk.TokenizerError, match="tokenizer = 'bites': not known; use byte, gpt2"):
        tk.load_tokenizer("bites")


def test_token_dtype():
    assert tk.token_dtype(2**16) == np.uint16
    assert tk.token_dtype(2**16 + 1) == np.uint32
