import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from sympow_jax.input_pipeline import open_store
from sympow_jax.input_pipeline import tokenizers as tk
from sympow_jax.input_pipeline.huggingface import HuggingFaceTokenizer
from sympow_jax.input_pipeline.prepare.build import Request, build
from sympow_jax.input_pipeline.prepare.text_files import TextFiles

WORDS = {"[UNK]": 0, "a": 1, "b": 2, "[BOS]": 3, "[EOS]": 4}


def words(vocabulary=WORDS, special=("[BOS]", "[EOS]", "[UNK]")) -> Tokenizer:
    """A tokenizer of whole words between spaces."""
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def content(tokenizer: Tokenizer, **changes) -> bytes:
    return json.dumps(json.loads(tokenizer.to_str()) | changes).encode()


def test_settings_kept_in_the_file_are_not_applied():
    library = words()
    library.enable_truncation(2)
    library.enable_padding(length=16, pad_id=1, pad_token="a")
    library.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 3), ("[EOS]", 4)]
    )
    tokenizer = HuggingFaceTokenizer(content(library))
    assert tokenizer.encode("a b b b a").tolist() == [1, 2, 2, 2, 1]
    assert tokenizer.encode("").tolist() == []
    assert Tokenizer.from_str(content(library).decode()).encode("a b b b a").ids[:3] == [3, 4, 1]  # what was kept


def test_bpe_dropout_is_not_applied():
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.9))
    tokenizer = HuggingFaceTokenizer(content(library))
    assert tokenizer.encode("ab" * 200).tolist() == [2] * 200


def unigram() -> Tokenizer:
    """As sentencepiece models are converted: the control symbols are pieces of the model, of the best score."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "▁</s>a")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    return library


def byte_bpe(special: bool) -> Tokenizer:
    library = Tokenizer(models.BPE({c: i for i, c in enumerate("<|endoftx>a")}, []))
    library.add_tokens([AddedToken("<|endoftext|>", special=special)])
    return library


@pytest.mark.parametrize(
    ("library", "text", "expected"),
    [
        (words(), "a [BOS] b", [1, 0, 0, 2]),  # "[" and "BOS]", which it does not know
        (unigram(), "a<s> </s>", [3, 8, 4, 6, 7, 3, 4, 5, 6, 7]),
        (byte_bpe(True), "a<|endoftext|>", [10, 0, 1, 2, 3, 4, 5, 6, 7, 2, 8, 7, 1, 9]),
        (byte_bpe(False), "a<|endoftext|>", [10, 0, 1, 2, 3, 4, 5, 6, 7, 2, 8, 7, 1, 9]),
    ],
)
def test_names_of_special_tokens_in_a_text_stay_text(library, text, expected):
    tokenizer = HuggingFaceTokenizer(content(library))
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.bos_id == library.token_to_id(
        {"a [BOS] b": "[BOS]", "a<s> </s>": "<s>"}.get(text, "<|endoftext|>")
    )


def test_a_name_that_cannot_stay_text_is_refused():
    library = words(WORDS | {"§": 5}, special=("§", "[UNK]"))
    with pytest.raises(
        tk.TokenizerError, match=r"the text holds '§', which this tokenizer cannot tell from its special"
    ):
        HuggingFaceTokenizer(content(library)).encode("a § b")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-json"])
def test_end_of_text_in_a_text_stays_text_under_gpt2(name, gpt2_folder):
    tokenizer = tk.load_tokenizer(f"{name}:{gpt2_folder}")
    ids = tokenizer.encode("x<|endoftext|>")
    assert tokenizer.bos_id not in ids.tolist() and tokenizer.decode(ids) == "x<|endoftext|>"


def test_gaps_between_ids(tmp_path):
    """Five ids of which the largest is 9: the vocabulary has 10, and BOS, which the file does not name, is id 10."""
    library = words({"[UNK]": 0, "a": 1, "b": 9, "c": 4, "d": 5}, special=("[UNK]",))
    (tmp_path / "gaps.json").write_bytes(content(library))
    tokenizer = tk.load_tokenizer(tmp_path / "gaps.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (11, 10)
    assert tokenizer.spec["bos_id"] == 10 and tokenizer.decode([1, 10, 9, 7]) == "a b"
    (tmp_path / "x.txt").write_text("a b c d " * 8)
    request = Request(documents="concatenate", document_length=33, heldout_fraction=0, chunks=(4, 33))
    build(TextFiles((str(tmp_path / "x.txt"),)), tmp_path / "made", tokenizer=tokenizer, request=request)
    store = open_store(str(tmp_path / "made" / "train.zarr"))
    assert (store.vocab_size, store.bos_id, store.tokenizer.bos_id) == (11, 10, 10)
    assert store.read(slice(0, 1), slice(0, 33))[0].tolist() == [1, 9, 4, 5] * 8 + [10]


def test_added_tokens_beyond_the_model():
    library = words(special=())
    library.add_special_tokens(["[BOS]", "[X]", "[Y]"])
    tokenizer = HuggingFaceTokenizer(content(library))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (7, 3)


def test_special_tokens_beyond_the_rows_of_a_model_are_left_out_and_the_specification_says_so(tmp_path):
    library = words()
    library.add_special_tokens(["[IMAGE]", "[END]"])
    whole = HuggingFaceTokenizer(content(library), eos_ids=[4])
    assert (whole.vocab_size, whole.least_rows) == (7, 5) and whole.with_rows(7) is whole
    tokenizer = whole.with_rows(5)
    tokenizer.save(tmp_path)
    saved = tk.load_tokenizer(tmp_path)
    assert saved.spec == tokenizer.spec == whole.spec | {"vocab_size": 5} and saved.digest != whole.digest
    assert (saved.vocab_size, saved.bos_id, saved.eos_ids) == (5, 3, (4,)) and saved.decode([1, 5, 2, 6]) == "a b"
    assert max(saved.encode("a [IMAGE] b").tolist()) < 5
    for wrong in (4, 7, "5", True):
        spec = json.dumps(saved.spec | {"vocab_size": wrong}).encode()
        with pytest.raises(tk.TokenizerError, match=r"vocab_size = .*: must be a whole number of 5\.\.6, or absent"):
            tk.tokenizer_from_files({"spec.json": spec, **saved.vocabulary_files()})
    assert HuggingFaceTokenizer(content(library), bos_id=5).least_rows == 6
    assert HuggingFaceTokenizer(content(library), eos_ids=[6]).least_rows == 7


def test_specifications_without_bos_id_mean_what_they_meant():
    gaps = words({"[UNK]": 0, "a": 1, "b": 9}, special=("[UNK]",))
    for library, bos in ((gaps, 3), (words(), 3), (words({"[UNK]": 0, "a": 1}, special=()), 2)):
        new = HuggingFaceTokenizer(content(library))
        old = {"kind": "huggingface", "sha256": new.spec["sha256"]}
        loaded = tk.tokenizer_from_files({"spec.json": json.dumps(old).encode(), **new.vocabulary_files()})
        assert loaded.bos_id == bos and loaded.spec == old
        assert (new.spec == old) == (library is not gaps)  # so that the digests of old stores stay
    for wrong in (-1, 99, "1", True):
        spec = json.dumps(old | {"bos_id": wrong}).encode()
        with pytest.raises(tk.TokenizerError, match=r"bos_id = .*: must be a whole number of 0..2"):
            tk.tokenizer_from_files({"spec.json": spec, **new.vocabulary_files()})


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        ({}, 3, ()),  # [BOS], by its name
        ({"tokenizer_config.json": {"bos_token": "a", "eos_token": {"content": "b"}}}, 1, (2,)),
        ({"special_tokens_map.json": {"bos_token": "b"}, "generation_config.json": {"eos_token_id": [4]}}, 2, (4,)),
        ({"tokenizer_config.json": {"eos_token": "b"}, "generation_config.json": {"eos_token_id": [1, 2]}}, 2, (2, 1)),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "[EOS]"}}, 4, (4,)),
        ({"tokenizer_config.json": {"bos_token": "b"}, "generation_config.json": {"bos_token_id": 1}}, 2, ()),
        ({"config.json": {"bos_token_id": 4, "eos_token_id": [3, 4]}}, 4, (3, 4)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": 4}}, 4, (4,)),
        ({"config.json": {"bos_token_id": 1, "eos_token_id": [None, 77, 2, "x"]}}, 3, ()),  # of no special token
    ],
)
def test_a_folder_says_what_begins_and_ends_a_text(files, bos, eos, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content(words()))
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = tk.load_tokenizer(spec)
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (bos, eos, 5)
    tokenizer.save(tmp_path / "saved")
    saved = tk.load_tokenizer(tmp_path / "saved")
    assert (saved.bos_id, saved.eos_ids) == (bos, eos)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bos_token": "<s>"}', r"tokenizer_config.json': bos_token '<s>' is no token of tokenizer.json"),
        ('{"bos_token_id": 77}', "bos_token 77 is no token"),
        ('{"bos_token": 5}', "bos_token 5 is no token"),
        ("[" * 100_000, r"tokenizer_config.json': no JSON"),
        ("[]", "a JSON object is needed, not list"),
    ],
)
def test_a_folder_that_names_no_token_is_refused(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content(words()))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(tk.TokenizerError, match=message):
        tk.load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(tk.TokenizerError, match=r"no tokenizer.json; use byte"):
        tk.load_tokenizer(tmp_path)
