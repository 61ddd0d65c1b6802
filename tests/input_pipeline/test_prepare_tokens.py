"""data/prepare.py nanogpt: what it writes is what its verify and training read, or nothing is written."""

import numpy as np
import pytest

from sympow_jax import prepare
from sympow_jax.input_pipeline import open_packed_store, open_store
from sympow_jax.input_pipeline.prepare import build as build_module
from sympow_jax.input_pipeline.prepare.build import BuildError, Request, build
from sympow_jax.input_pipeline.prepare.shards import SourceError
from sympow_jax.input_pipeline.prepare.sources import Document
from sympow_jax.input_pipeline.prepare.text_files import TextFiles
from sympow_jax.input_pipeline.prepare.token_source import TokenFiles
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer, IdTokenizer

TOKENS = [464, 3290, 318, 50256, 1212, 0, 13]


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "in" / "a.bin"
    path.parent.mkdir()
    np.array(TOKENS, "<u2").tofile(path)
    return path


def run(path, output, *flags) -> int:
    shape = ("--documents=packed", "--heldout_fraction=0", "--num_workers=1")
    return prepare.run(["nanogpt", str(path), f"--output={output}", *shape, *flags])


def test_the_default_tokenizer_is_the_one_beside_the_file(tokens, gpt2_folder, tmp_path, capsys):
    (tokens.parent / "tokenizer").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (gpt2_folder / name).rename(tokens.parent / "tokenizer" / name)
    assert run(tokens, tmp_path / "made") == 0
    assert prepare.run(["verify", str(tmp_path / "made")]) == 0, capsys.readouterr().out
    store = open_packed_store(str(tmp_path / "made" / "train.zarr"), seq_len=6)
    assert (store.vocab_size, store.bos_id) == (50257, 50256)
    read, documents = store.read(slice(0, 1), slice(0, 6))[0].tolist(), ([464, 3290, 318], [1212, 0, 13])
    assert read in ([*documents[0], *documents[1]], [*documents[1], *documents[0]])
    assert store.offsets.tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer=byte"], "token 464 at 0, but vocab_size = 257; name the tokenizer that made the tokens"),
        (["--tokenizer=train:300"], "files of tokens hold no text to train on"),
        (["--tokenizer=byte", "--dtype=int32"], "14 bytes are no whole number of int32"),
        (["--dtype=uint8"], r"uint8 tokens (nanogpt) of an unknown vocabulary"),
    ],
)
def test_what_verify_would_refuse_is_not_written(flags, message, tokens, tmp_path, capsys):
    assert run(tokens, tmp_path / "made", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("made*"))


def test_tokens_of_another_number_type(tmp_path):
    np.array([5, 70000, 0, 6], "<i8").tofile(tmp_path / "a.bin")
    IdTokenizer(80_000).save(tmp_path / "ids")
    assert run(tmp_path / "a.bin", tmp_path / "made", "--dtype=int64", f"--tokenizer={tmp_path / 'ids'}") == 0
    store = open_packed_store(str(tmp_path / "made" / "train.zarr"), seq_len=3)
    assert sorted(store.read(slice(0, 1), slice(0, 3))[0].tolist()) == [
        5,
        6,
        70000,
    ]  # 0 is BOS here


def test_dtype_is_for_tokens(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert prepare.run(["text", str(tmp_path / "a.txt"), f"--output={tmp_path / 'o'}", "--dtype=int32"]) == 2
    assert "--dtype = 'int32': only nanogpt reads raw tokens" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [257, 65536 + 5, -1])
def test_ids_beyond_the_tokenizer_are_refused_from_any_source(wrong, tmp_path):
    """65541 would be 5 in sixteen bits."""

    class Stub:
        def describe(self):
            return {}

        def documents(self):
            yield Document("a", np.array([1, 2, wrong]))

    with pytest.raises(SourceError, match=rf"a document holds token {max(2, wrong)} .*, but the tokenizer byte has"):
        build(Stub(), tmp_path / "made", tokenizer=ByteTokenizer(), request=Request(document_length=3))
    assert not (tmp_path / "made").exists()


def test_a_store_that_cannot_be_read_back_does_not_appear(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 20)
    source = TextFiles((str(tmp_path / "a.txt"),))
    request = Request(document_length=100, heldout_fraction=0)
    whole = build_module.write_array

    def damaged(folder, *arguments, **options):
        digests = whole(folder, *arguments, **options)
        (folder / "0.0").write_bytes(b"\0" * 20)
        return digests

    monkeypatch.setattr(build_module, "write_array", damaged)
    with pytest.raises(BuildError, match=r"cannot be read, so nothing is kept: .* chunk 0\.0 is damaged"):
        build(source, tmp_path / "made", tokenizer=ByteTokenizer(), request=request)
    assert [path.name for path in tmp_path.glob("made*")] == ["made.lock"]
    monkeypatch.setattr(build_module, "write_array", whole)
    build(source, tmp_path / "made", tokenizer=ByteTokenizer(), request=request)
    assert open_store(str(tmp_path / "made" / "train.zarr")).read(slice(0, 1), slice(0, 4))[0].tolist() == list(b"some")


def test_documents_end_at_bos_and_at_the_tokenizers_eos(tmp_path):
    np.array([0, 5, 6, 2, 0, 7, 2, 8], "<u2").tofile(tmp_path / "a.bin")
    tokenizer = IdTokenizer(10)
    tokenizer.eos_ids = (2, 6)  # the second ends a turn, not a text
    source = TokenFiles((str(tmp_path / "a.bin"),)).cut_for(tokenizer)
    assert [np.asarray(document.content).tolist() for document in source.documents()] == [[5, 6], [7], [8]]
