"""Folders with every format that people keep text in: each is read right, or named."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sympow_jax import prepare
from sympow_jax.input_pipeline import open_packed_store
from sympow_jax.input_pipeline.prepare import decompress, shards
from sympow_jax.input_pipeline.prepare.build import heldout
from sympow_jax.input_pipeline.prepare.file_formats import decode
from sympow_jax.input_pipeline.prepare.sources import SourceError
from sympow_jax.input_pipeline.prepare.text_files import TextFiles

WORDS = ["naïve café", "雪と桜", "🜁 one\ttwo\r\nthree"]
LINES = "".join(json.dumps({"text": word, "n": 1}) + "\n" for word in WORDS)
TABLE = pa.table({"n": [1, 2, 3], "text": WORDS})


def packed(codec: str, content: bytes) -> bytes:
    """What pyarrow compresses `content` to."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(new, table=TABLE) -> bytes:
    """`table` in IPC format; `new` is pa.ipc.new_file or new_stream."""
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet(table=TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def read(*inputs, field="text") -> dict[str, str]:
    """{key: text} of every document."""
    documents = list(TextFiles(tuple(map(str, inputs)), field).documents())
    assert len({document.key for document in documents}) == len(documents)
    return {document.key: document.content for document in documents}


TEXT = "\n".join(WORDS)
RAW = TEXT.encode()
READ = {  # content, and the documents it holds
    "a.txt": (RAW, [TEXT]),
    "empty.md": (b"", [""]),
    "bz.txt": (b"BZhang wrote this text", ["BZhang wrote this text"]),
    "par.txt": (b"PAR1 is a word", ["PAR1 is a word"]),
    "quote.txt": (b'He said {"x"}: see 4 ftyp', ['He said {"x"}: see 4 ftyp']),
    "tar.txt": (b"x" * 257 + b"ustar", ["x" * 257 + "ustar"]),
    "bom.txt": (b"\xef\xbb\xbf" + RAW, [TEXT]),
    "le16.txt": (b"\xff\xfe" + TEXT.encode("utf-16-le"), [TEXT]),
    "be16.txt": (b"\xfe\xff" + TEXT.encode("utf-16-be"), [TEXT]),
    "le32.txt": (b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"), [TEXT]),
    "be32.txt": (b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"), [TEXT]),
    "g.txt.gz": (gzip.compress(RAW), [TEXT]),
    "members.GZ": (gzip.compress(RAW) + gzip.compress(b"more"), [TEXT + "more"]),
    "unnamed_gz.txt": (gzip.compress(RAW), [TEXT]),
    "b.txt.bz2": (bz2.compress(RAW) + bz2.compress(b"more"), [TEXT + "more"]),
    "x.txt.xz": (lzma.compress(RAW) + b"\0" * 8 + lzma.compress(b"more"), [TEXT + "more"]),
    "z.txt.zst": (packed("zstd", RAW) + packed("zstd", b"more"), [TEXT + "more"]),
    "l.txt.lz4": (packed("lz4", RAW), [TEXT]),
    "skippable.zst": (b"\x50\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc" + packed("zstd", RAW), [TEXT]),
    "lines.jsonl": (LINES.encode(), WORDS),
    "UPPER.JSONL": (LINES.encode() + b"\n \n", WORDS),
    "windows.jsonl": (b"\xff\xfe" + LINES.replace("\n", "\r\n").encode("utf-16-le"), WORDS),
    "g.jsonl.gz": (gzip.compress(LINES.encode()), WORDS),
    "z.Jsonl.Zst": (packed("zstd", LINES.encode()), WORDS),
    "n.ndjson": (LINES.encode().rstrip(), WORDS),
    "list.json": (json.dumps([{"text": word} for word in WORDS], indent=1).encode(), WORDS),
    "short_list.json": (json.dumps([{"text": word} for word in WORDS]).encode(), WORDS),
    "object.json": (json.dumps({"text": "alone"}, indent=1).encode(), ["alone"]),
    "lines.json.gz": (gzip.compress(LINES.encode()), WORDS),
    "t.parquet": (parquet(), WORDS),
    "large.parquet": (parquet(pa.table({"text": pa.array(WORDS, pa.large_string())})), WORDS),
    "coded.parquet": (parquet(pa.table({"text": pa.array(WORDS).dictionary_encode()})), WORDS),
    "file.arrow": (arrow(pa.ipc.new_file), WORDS),
    "stream.arrow": (arrow(pa.ipc.new_stream), WORDS),
}
FOREIGN = {  # content, and what it is called
    "p.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a PNG image"),
    "j.jpg": (b"\xff\xd8\xff\xe0" + b"x" * 99, "a JPEG image"),
    "d.pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document"),
    "t.csv": (b"text,n\nhello,1\n", "a .csv table"),
    "t.TSV.gz": (gzip.compress(b"text\tn\nhello\t1\n"), "a .tsv table"),
    "n.npy": (b"\x93NUMPY\x01\0" + bytes(99), "a NumPy array"),
    "s.safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}' + bytes(99), "a safetensors file"),
    "old.pt": (pickle.dumps({"text": "x"}, protocol=2), "a Python pickle"),
    "w.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"), "a WARC crawl archive"),
    "tokens.bin": (np.arange(1, 300, dtype="<u2").tobytes(), "binary data, or UTF-16 without"),
    "nobom.txt": ("ab".encode("utf-16-le"), "binary data, or UTF-16 without a byte order mark"),
    "d.sqlite": (b"SQLite format 3\0" + bytes(99), "an SQLite database"),
}


@pytest.fixture
def everything(tmp_path):
    """One file of each format, in a folder that also holds what nobody means to train on."""
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    for name, (content, _) in (READ | FOREIGN).items():
        (folder / "sub" / name).write_bytes(content)
    with zipfile.ZipFile(folder / "w.docx", "w") as archive:
        archive.writestr("document.xml", "<w/>")
    subprocess.run(["tar", "czf", folder / "t.tar.gz", "-C", folder / "sub", "a.txt"], check=True)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "00").write_text("no document")
    (folder / ".hidden.txt").write_text("no document")
    (folder / "dangling.txt").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.txt")
    (folder / "linked").symlink_to(folder / "sub", target_is_directory=True)
    shards_ = [arrow(pa.ipc.new_stream, TABLE.slice(i, n)) for i, n in ((0, 2), (2, 1))]
    saved = folder / "saved" / "train"
    saved.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, content in zip([*names, "cache-0123.arrow"], [*shards_, shards_[0]], strict=True):
        (saved / name).write_bytes(content)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (saved / "dataset_info.json").write_text("{}")
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return folder


def test_every_format_is_read_right_or_named(everything, tmp_path, caplog, capsys):
    output = tmp_path / "made"
    flags = [f"--output={output}", "--documents=packed", "--heldout_fraction=0", "--num_workers=1"]
    assert prepare.run(["text", *flags, str(everything)]) == 0, capsys.readouterr().err
    store = open_packed_store(str(output / "train.zarr"), seq_len=1)
    tokens = bytes(store.read(slice(0, store.num_documents), slice(0, 1)).reshape(-1).tolist())
    found = sorted(tokens[a:b].decode() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True))
    expected = [text for _, texts in READ.values() for text in texts if text] + WORDS
    assert found == sorted(expected)
    left_out = {
        **{f"sub/{name}": what for name, (_, what) in FOREIGN.items()},
        "w.docx": "a zip archive", "t.tar.gz": "a tar archive",
        ".git": "hidden", ".hidden.txt": "hidden",
        "dangling.txt": "no regular file", "pipe.txt": "no regular file", "linked": "linked folders",
        "saved/train/cache-0123.arrow": "caches of a saved dataset",
        **dict.fromkeys(["saved/train/state.json", "saved/train/dataset_info.json", "saved/dataset_dict.json"],
                        "bookkeeping"),
    }  # fmt: skip
    for name, what in left_out.items():
        assert any(what in line and repr(str(everything / name)) in line for line in caplog.messages), name
    assert sum(int(line.split()[2]) for line in caplog.messages) == len(left_out)


@pytest.mark.parametrize("name", READ)
def test_a_file_named_alone_is_read_as_in_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(decompress, "BLOCK", 5)  # characters and members lie across blocks
    monkeypatch.setattr(decompress, "_XZ_BLOCK", 5)
    content, texts = READ[name]
    (tmp_path / name).write_bytes(content)
    assert list(read(tmp_path / name).values()) == texts


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_that_is_named_is_refused(name, tmp_path):
    content, what = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "fine.txt").write_text("fine")
    with pytest.raises(SourceError, match="but text is needed") as caught:
        read(tmp_path / "fine.txt", tmp_path / name)
    assert what in str(caught.value) and f"{name}'" in str(caught.value) and "\n" not in str(caught.value)


GZ = gzip.compress(RAW)
SURROGATE = b'{"text": "fine"}\n{"text": "a \\ud83d b"}\n'
BAD = {  # content, and the reason: refused wherever it lies, because it would have been read
    "latin1.txt": (("x" * 3_000_000 + "café x").encode("latin-1"), r"byte 0xe9 at offset 3000003 is no UTF-8"),
    "cut.txt": (RAW[:3], "byte 0xc3 at offset 2 is no UTF-8 .unexpected end"),
    "null.txt": (b"\xc3\xa9" + b"x" * 9000 + b"\0", "null byte at offset 9002"),
    "null16.txt": (b"\xff\xfe" + "🜁é\0".encode("utf-16-le"), "null byte at offset 8"),
    "half16.txt": (b"\xff\xfea\0\x00\xd8b\0", "offset 4 is no UTF-16-LE"),
    "cut.gz": (GZ[:-9], "damaged gzip data: Truncated"),
    "crc.gz": (GZ[:-8] + b"0000" + GZ[-4:], "damaged gzip data: .*incorrect data check"),
    "tail.gz": (GZ + b"garbage", "damaged gzip data"),
    "cut.bz2": (bz2.compress(RAW)[:-5], "damaged bz2 data: Truncated"),
    "tail.bz2": (bz2.compress(RAW) + b"garbage", "damaged bz2 data"),
    "cut.xz": (lzma.compress(RAW)[:-5], "damaged xz data: cut off"),
    "tail.xz": (lzma.compress(RAW) + b"garbage", "damaged xz data"),
    "cut.zst": (packed("zstd", RAW)[:-5], "damaged zstd data: Truncated"),
    "tail.zst": (packed("zstd", RAW) + b"garbage", "damaged zstd data"),
    "plain.gz": (RAW, "named .gz, but holds no gzip data"),
    "none.gz": (b"", "named .gz, but holds no gzip data"),
    "twice.gz": (gzip.compress(GZ), "compressed twice"),
    "plain.parquet": (RAW, "named .parquet, but holds no such table"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "cut.parquet": (parquet()[:-20], "cannot be read"),
    "cut.arrow": (arrow(pa.ipc.new_stream)[:-150], "cannot be read"),
    "utf8.arrow": (arrow(pa.ipc.new_stream).replace("é".encode(), b"\xc3\x28"), "cannot be read: .*Invalid UTF8"),
    "null.parquet": (parquet(pa.table({"text": ["a", None]})), "row 2 has no text in column 'text'"),
    "ids.parquet": (parquet(pa.table({"text": [[1, 2]]})), "column 'text' holds list<.*>, but text is needed"),
    "other.parquet": (parquet(pa.table({"body": ["a"]})), r"no columns 'text' among \['body'\]; set --field"),
    "surrogate.jsonl": (SURROGATE, r"line 2: character 2 of 'text' is half of a surrogate pair \(.ud83d\)"),
    "surrogate.json": (b'[{"text": "\\udc00"}]', "record 1: character 0 of 'text' is half"),
    "broken.jsonl": (b'{"text": "a"}\n{\n', "line 2 is no JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is no JSON"),
    "body.jsonl": (b'{"n": 1, "body": "a"}\n', r"line 1 has no text field 'text', only \['body', 'n'\]; set --field"),
    "words.jsonl": (b'"a"\n', "line 1 is no object with a text field 'text', but str"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: 'text' is 3, which is no text"),
    "cut.json": (b'[{"text": "a"}, {"te', "its content is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_right_is_refused_with_its_place(name, tmp_path, capsys):
    content, reason = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "zz.txt").write_text("fine")
    for inputs in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(SourceError, match=reason) as caught:
            read(inputs)
        assert f"{name}'" in str(caught.value) and "\n" not in str(caught.value)


def test_settings_of_programs_in_a_folder_are_left_out_by_name_and_refused_when_named(tmp_path, caplog):
    settings = {"package": '{"name": "x"}', "tsconfig": '{\n  // "no" JSON\n}', "list": "[1, 2]", "nothing": ""}
    for name, content in settings.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "data.json").write_text('[{"text": "a"}, {"text": "b"}]')
    (tmp_path / "main.py").write_text("print()")
    assert list(read(tmp_path).values()) == ["a", "b", "print()"]
    assert "4 left out, a .json without records that have a text field 'text': " in caplog.text
    for name in settings:
        assert f"{name}.json" in caplog.text
        with pytest.raises(SourceError, match=f"{name}.json'"):
            read(tmp_path / f"{name}.json")


def test_a_missing_shard_of_a_saved_dataset_is_named(everything):
    (everything / "saved" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"saved/train': state.json lists 'data-00001-of-00002.arrow', which is not"):
        read(everything)


def test_a_split_depends_on_the_files_not_on_how_they_are_named(tmp_path, monkeypatch):
    for root in ("here/corpus", "there/corpus"):
        for number in range(40):
            book = tmp_path / root / f"book{number}"
            book.mkdir(parents=True)
            (book / "text.txt").write_text(f"text {number}")
        (tmp_path / root / "p.png").write_bytes(FOREIGN["p.png"][0])
    corpus = tmp_path / "here" / "corpus"
    paths = sorted(str(path) for path in corpus.glob("*/text.txt"))
    (tmp_path / "link").symlink_to(corpus, target_is_directory=True)
    monkeypatch.chdir(corpus)
    namings = [
        [corpus], [f"{corpus}/*/text.txt"], [f"{corpus}/**"], [f"{corpus}/*"], paths, paths[::-1],
        [corpus, *paths[:3]], ["."], ["../corpus/"], [tmp_path / "there" / "corpus"], [tmp_path / "link"],
    ]  # fmt: skip
    expected = {f"book{number}/text.txt": f"text {number}" for number in range(40)}
    for inputs in namings:
        found = read(*inputs)
        assert found == expected and list(found) == sorted(expected), inputs
    assert len({json.dumps(TextFiles(tuple(map(str, inputs))).describe()) for inputs in namings}) == 1
    held = heldout(np.array([shards._hash(key) for key in expected], np.uint64), 0.5)
    assert 10 < held.sum() < 30


def test_names_are_of_the_files_read_alone_and_a_link_is_no_second_document(tmp_path):
    deep = tmp_path / "in" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "in" / "p.png").write_bytes(FOREIGN["p.png"][0])
    (deep / "1.txt").write_text("one")
    (deep / "2.txt").symlink_to(deep / "1.txt")
    (deep / "3.txt").write_text("three")
    for inputs in (tmp_path / "in", deep, f"{deep}/*.txt"):
        assert read(inputs) == {"1.txt": "one", "3.txt": "three"}


def test_names_that_are_no_utf8_and_files_that_cannot_be_opened(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    odd = os.fsencode(folder) + b"/caf\xe9\n.txt"
    with open(odd, "wb") as file:
        file.write(b"fine")
    (folder / "b.txt").write_text("also")
    assert sorted(read(folder).values()) == ["also", "fine"]
    assert shards._hash(os.fsdecode(b"caf\xe9\n.txt")) == shards._hash(next(k for k in read(folder) if "caf" in k))
    assert TextFiles((str(folder),)).describe()["files"] == 2
    with open(odd, "wb") as file:
        file.write(b"\xff")
    with pytest.raises(SourceError) as caught:
        read(folder)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    for function, name in (("io.open", "b.txt"), ("os.scandir", "in")):
        with monkeypatch.context() as patch:  # root may read everything, so the system's answer is played
            patch.setattr(function, denied)
            with pytest.raises(SourceError, match=rf"{name}': cannot be read \(Permission denied\)"):
                read(folder)


def denied(path, *arguments, **options):
    raise PermissionError(13, "Permission denied", str(path))


def test_an_end_without_content_between_two_xz_streams_is_no_end_of_the_text(tmp_path):
    """The first stream ends inside a character, and a block of the file holds nothing but its last bytes."""
    first = lzma.compress(b"abc\xc3")
    blocks = [first[:-4], first[-4:], lzma.compress(b"\xa9")]
    assert "".join(decode(decompress._xz_blocks(iter(blocks)), b"abc")) == "abcé"


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(SourceError, match=r"is no name; '\.' is the present folder"):
        read("")  # as an unset variable of a shell gives
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    for given, reason in [("*.md", "no such file, folder or glob"), ("empty", "no file to read"),
                          ("gone.txt", "is a broken link or no regular file")]:  # fmt: skip
        with pytest.raises(SourceError, match=reason):
            TextFiles((str(tmp_path / given),)).describe()
    (tmp_path / "empty" / "p.png").write_bytes(FOREIGN["p.png"][0])
    with pytest.raises(SourceError, match=r"no file to read; 1 left out, a PNG image: '.*p.png'"):
        read(tmp_path / "empty")
