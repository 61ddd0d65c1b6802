import gzip
import hashlib
import json
import struct

import numpy as np
import pytest

from sympow_jax.input_pipeline import StoreError, open_data
from sympow_jax.input_pipeline.address import AddressError
from sympow_jax.input_pipeline.prepare.token_source import TokenFiles
from sympow_jax.input_pipeline.token_files import open_token_file
from sympow_jax.input_pipeline.tokenizers import IdTokenizer
from tests.input_pipeline.stores import random_tokens

IDS = [50256, 464, 3290, 318, 50256, 50256, 1212, 0, 0, 13]  # two documents
DOCUMENTS = [[464, 3290, 318], [1212, 0, 0, 13]]
LARGE = [128000, 9906, 1917, 128000, 70000, 2]


def shard(tokens, *, magic=20240520, version=1, count=None, form="<H", order="<") -> bytes:
    """As llm.c writes it: 256 int32 of header, then the tokens."""
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return struct.pack(f"{order}256i", *header) + b"".join(struct.pack(form, token) for token in tokens)


def index(lengths, boundaries, *, code=4, width=4, version=1, pointers=None) -> bytes:
    """As Megatron writes it: sequences of these lengths end to end, documents from boundary to boundary."""
    pointers = [width * sum(lengths[:i]) for i in range(len(lengths))] if pointers is None else pointers
    counts = struct.pack("<QBQQ", version, code, len(lengths), len(boundaries))
    parts = struct.pack(f"<{len(lengths)}i", *lengths), struct.pack(f"<{len(lengths)}q", *pointers)
    return b"MMIDIDX\0\0" + counts + b"".join(parts) + struct.pack(f"<{len(boundaries)}q", *boundaries)


def stored(address: str) -> list[int]:
    """All tokens as training reads them."""
    store = open_data(address, "train", seq_len=1)
    return store.read(slice(0, store.num_documents), slice(0, store.document_length)).reshape(-1).tolist()


def documents(path, *, ends=(50256,), vocab_size=50257, dtype="") -> list[list[int]]:
    """All documents as data/prepare.py reads them."""
    source = TokenFiles((str(path),), dtype, ends, vocab_size)
    return [np.asarray(document.content).tolist() for document in source.documents()]


@pytest.fixture
def vocabulary(tmp_path):
    """A tokenizer of 128,256 ids in tokenizer/ beside the files; its BOS is 0."""
    IdTokenizer(128_256).save(tmp_path / "tokenizer")


def test_raw_uint16_is_nanogpts(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack(f"<{len(IDS)}H", *IDS))
    assert stored(str(path)) == IDS and documents(path) == DOCUMENTS
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_data(str(path), "train", seq_len=1).digest == f"sha256:{digest}"
    assert TokenFiles((str(path),)).describe() == {"kind": "nanogpt", "sha256": digest}


def test_shards_of_gpt2(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(shard(IDS))
    assert stored(str(path)) == IDS and documents(path) == DOCUMENTS


@pytest.mark.usefixtures("vocabulary")
def test_shards_of_llama_3(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(shard(LARGE, magic=20240801, version=7, form="<I"))
    assert stored(str(path)) == LARGE
    assert documents(path, ends=(128000,), vocab_size=128_256) == [[9906, 1917], [70000, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard(IDS, version=2), "version 2 under magic 20240520; 1 can be read"),
        (shard(IDS, magic=20240801), "version 1 under magic 20240801; 7 can be read"),
        (shard(IDS, count=11), "says 11 tokens of uint16, the file holds 10; fetch it again"),
        (shard(IDS)[:-1], r"says 10 tokens of uint16, the file holds 9\.5"),
        (shard([]), "says 0 tokens"),
        (shard(IDS)[:100], "100 bytes, shorter than its header of 1024"),
        (shard(IDS, order=">"), "is a shard of llm.c in big-endian order"),
        (shard(IDS, magic=20240522), "is an evaluation file of llm.c"),
        (shard([464, 50257]), "token 50257 at 1, but vocab_size = 50257"),
        (gzip.compress(shard(IDS)), "is compressed with gzip; unpack it first"),
        (b"PAR1" + bytes(range(64)), "is a Parquet table; give it to `prepare.py text`"),
        (index([3], [0, 1]), "is a Megatron index; name the .bin"),
        ("Once upon a time, naïvely: ".encode() * 300, "holds text; give it to `prepare.py text`"),
        (b"", "is empty"),
        (b"\0\1\2", "no whole number of uint16; it is cut, or name the number type, as in FILE.dtype=int32"),
        (struct.pack("<4i", 464, 3290, 318, 13), "looks like int32, not uint16: .* name the number type"),
        (np.array(LARGE * 50, "<i4").tobytes(), "looks like int32"),
        (np.array(LARGE * 50, "<i8").tobytes(), "looks like int64"),
        (np.array([0, 1, 1, 0], "<i8").tobytes(), "looks like int64"),
        (np.array(LARGE * 50, ">i4").tobytes(), "looks like big-endian int32"),
        (np.array(LARGE * 50, ">i8").tobytes(), "looks like big-endian int64"),
        (np.arange(300).astype(">u2").tobytes(), "looks like big-endian uint16"),
    ],
)
def test_what_is_no_uint16_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        open_data(str(path), "train", seq_len=1)
    with pytest.raises(StoreError, match=message):
        documents(path)


@pytest.mark.parametrize("vocab", [2, 4, 12, 65, 257, 50257])
def test_uint16_is_never_taken_for_another(vocab, tmp_path, rng):
    for number in range(20):
        length = int(rng.integers(40, 5000))
        uniform = rng.integers(0, vocab, length)
        tokens = uniform.astype("<u2") if number % 2 else random_tokens(rng, (length,), vocab=vocab)
        tokens.tofile(tmp_path / "a.bin")
        assert stored(str(tmp_path / "a.bin")) == tokens.tolist()


@pytest.mark.usefixtures("vocabulary")
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", ">u4", "<i4"])
def test_the_number_type_of_raw_tokens_can_be_named(dtype, tmp_path):
    path = tmp_path / "a.bin"
    np.array(LARGE, dtype).tofile(path)
    assert stored(f"{path}?dtype={dtype}") == LARGE
    assert documents(path, ends=(128000,), vocab_size=128_256, dtype=dtype) == [[9906, 1917], [70000, 2]]
    digests = {open_data(f"{path}?dtype={name}", "train", seq_len=1).digest for name in (dtype, "uint8", "uint16")}
    assert len(digests) == 3


def test_named_number_types_and_vocabularies_are_checked(tmp_path):
    path = tmp_path / "a.bin"
    np.array([5, -100, 7], "<i4").tofile(path)
    with pytest.raises(StoreError, match=r"int32 tokens \(nanogpt\) of an unknown vocabulary; put the tokenizer"):
        open_data(f"{path}?dtype=int32", "train", seq_len=1)
    with pytest.raises(StoreError, match=r"token -100 at 1, but vocab_size = 257; .* \(int32 was read\)"):
        open_data(f"{path}?dtype=int32&tokenizer=byte", "train", seq_len=1)
    with pytest.raises(StoreError, match="12 bytes are no whole number of int64"):
        open_data(f"{path}?dtype=int64", "train", seq_len=1)
    for wrong in ("float32", "u3", "O"):
        with pytest.raises(StoreError, match=f"dtype = '{wrong}': legal are uint8, uint16, int32"):
            open_data(f"{path}?dtype={wrong}", "train", seq_len=1)
    with pytest.raises(AddressError, match=r"option 'type=int32' is unknown, .*; options are dtype=..., tokenizer="):
        open_data(f"{path}?type=int32", "train", seq_len=1)
    path.write_bytes(shard(IDS))
    with pytest.raises(StoreError, match=r"says itself that it is llm\.c of uint16; leave out dtype"):
        open_data(f"{path}?dtype=int32", "train", seq_len=1)
    with pytest.raises(StoreError, match="no such file"):
        open_data(str(tmp_path / "b.bin"), "train", seq_len=1)


@pytest.mark.usefixtures("vocabulary")
def test_an_outlier_between_the_samples_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.bin"
    tokens = np.full(4 * 65536, 7, "<i4")
    tokens[100_000] = 128_256
    tokens.tofile(path)
    store = open_data(f"{path}?dtype=int32", "train", seq_len=1)
    with pytest.raises(StoreError, match="token 128256 at 100000"):
        store.read(slice(0, 3), slice(5, 65000))
    with pytest.raises(StoreError, match="token 128256 at 100000"):
        documents(path, vocab_size=128_256, dtype="int32")


@pytest.mark.usefixtures("vocabulary")
@pytest.mark.parametrize(("code", "number"), [(4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatrons_documents(code, number, tmp_path):
    """Four sequences in three documents, the second of which is empty; each ends with the end-of-text token 2."""
    tokens = [11, 12, 2, 13, 60000, 14, 2, 15, 2]
    path = tmp_path / "a.bin"
    np.array(tokens, number).tofile(path)
    path.with_suffix(".idx").write_bytes(index([3, 4, 0, 2], [0, 2, 3, 4], code=code, width=np.dtype(number).itemsize))
    offsets = open_token_file(str(path)).offsets
    assert offsets is not None and offsets.tolist() == [0, 7, 7, 9]
    assert documents(path, ends=(2,), vocab_size=128_256) == [[11, 12, 2, 13, 60000, 14], [15]]
    assert stored(str(path)) == tokens
    before = TokenFiles((str(path),)).describe()
    path.with_suffix(".idx").write_bytes(index([3, 4, 2], [0, 1, 3], code=code, width=np.dtype(number).itemsize))
    assert TokenFiles((str(path),)).describe() != before


GOOD = index([2, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "a.idx is cut: 81 bytes for 2 sequences and 3 boundaries"),
        (GOOD[:20], "no Megatron index"),
        (b"TNTIDX\0\0" + GOOD[9:], r"no Megatron index \(magic MMIDIDX\); move it away"),
        (b"", "no Megatron index"),
        (index([2, 1], [0, 1, 2], version=2), "has version 2 and number type 4; legal are version 1 and 1 .uint8."),
        (index([2, 1], [0, 1, 2], code=7), "number type 7"),
        (index([2, 1], [0, 1, 2], pointers=[0, 4]), "do not lie end to end"),
        (index([2, -1], [0, 1, 2], pointers=[0, 8]), "do not lie end to end"),
        (index([2, 1], [0, 2, 1]), "do not rise from sequence 0 to 2"),
        (index([2, 1], [1, 2]), "do not rise from sequence 0 to 2"),
        (index([2, 1], []), "do not rise from sequence 0 to 2"),
        (index([2, 2], [0, 1, 2]), "describes 4 tokens of int32, 16 bytes; the file has 12"),
        (index([2, 1], [0, 1, 2], code=8, width=2), "describes 3 tokens of uint16, 6 bytes; the file has 12"),
        (GOOD[:18] + struct.pack("<Q", 2**60) + GOOD[26:], "is cut"),
        (GOOD, r"int32 tokens \(megatron\) of an unknown vocabulary"),
    ],
)
def test_indices_that_do_not_fit_are_refused(content, message, tmp_path):
    np.array([11, 12, 13], "<i4").tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        open_data(str(tmp_path / "a.bin"), "train", seq_len=1)


def test_npy(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array(IDS, "<u2"))
    assert stored(str(path)) == IDS and documents(path) == DOCUMENTS
    path.rename(tmp_path / "a.bin")
    assert stored(str(tmp_path / "a.bin")) == IDS
    np.save(path, np.array(LARGE, ">i4"))
    assert stored(f"{path}?tokenizer={_ids(tmp_path)}") == LARGE
    for wrong in (np.zeros((2, 3), "<u2"), np.zeros(3), np.zeros(0, "<u2"), np.array(5, "<u2")):
        np.save(path, wrong)
        with pytest.raises(StoreError, match="one row of whole numbers is needed"):
            open_data(str(path), "train", seq_len=1)
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"damaged \.npy"):
        open_data(str(path), "train", seq_len=1)
    np.save(path, np.array(IDS, "<u2"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StoreError, match=r"damaged \.npy"):
        open_data(str(path), "train", seq_len=1)


def _ids(tmp_path) -> str:
    IdTokenizer(128_256).save(tmp_path / "ids")
    return str(tmp_path / "ids")


def test_several_files_are_one_source(tmp_path):
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, tokens in zip(paths, (IDS, IDS[::-1]), strict=True):
        path.write_bytes(shard(tokens))
    source = TokenFiles(tuple(map(str, paths)))
    found = list(source.documents())
    contents = [np.asarray(document.content).tolist() for document in found]
    assert contents == [*DOCUMENTS, *(d[::-1] for d in DOCUMENTS[::-1])]
    assert len({document.key for document in found}) == 4
    assert json.loads(json.dumps(source.describe()))["files"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zarr.json", "holds zarr v3, but v2 is read; write it again with zarr_format=2"),
        (".zgroup", "holds a zarr group; name the array in it"),
        ("state.json", "holds a Hugging Face dataset; make a store of it with `data/prepare.py text"),
        ("notes.txt", "no zarr v2 array there"),
    ],
)
def test_folders_that_are_no_store_say_what_they_are(name, message, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(StoreError, match=message):
        open_data(str(tmp_path), "train", seq_len=1)
    with pytest.raises(StoreError, match="is a file, and no file of tokens"):
        open_data(str(tmp_path / name), "train", seq_len=1)


def test_a_few_uint16_are_not_judged_by_small_ids(tmp_path):
    """In a long file every second id below 16 is the upper half of an int32; in a short one it is chance."""
    tokens = [20000, 3, 20001, 7, 20000, 9]
    (tmp_path / "a.bin").write_bytes(struct.pack("<6H", *tokens))
    assert stored(str(tmp_path / "a.bin")) == tokens
