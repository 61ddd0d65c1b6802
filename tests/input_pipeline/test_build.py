import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sympow_jax import prepare
from sympow_jax.input_pipeline import default_corpus, open_packed_store, open_store
from sympow_jax.input_pipeline.prepare import shards as shards_module
from sympow_jax.input_pipeline.prepare.build import BuildError, Request, build, heldout
from sympow_jax.input_pipeline.prepare.progress import Progress
from sympow_jax.input_pipeline.prepare.sources import PythonStdlib
from sympow_jax.input_pipeline.prepare.text_files import TextFiles
from sympow_jax.input_pipeline.prepare.token_source import TokenFiles
from sympow_jax.input_pipeline.prepare.verify import verify
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]


def text(number: int, length: int) -> str:
    return "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length))


@pytest.fixture
def folder(tmp_path):
    """Documents of 3 to 90 letters."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number in range(30):
        (inputs / f"{number:02d}.txt").write_text(text(number, 3 + 3 * number))
    return inputs


def files(path: pathlib.Path) -> dict[str, str]:
    """Digest of every file below `path`."""
    found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def make(folder, output, **options):
    request = Request(**{"document_length": 16, "chunks": (4, 8), "heldout_fraction": 0.3, **options})
    return build(TextFiles((str(folder),)), output, tokenizer=ByteTokenizer(), request=request)


def rows(path: pathlib.Path) -> list[bytes]:
    store = open_store(str(path))
    everything = store.read(slice(0, store.num_documents), slice(0, store.document_length))
    return [b"".join(b"|" if token == 256 else bytes([token]) for token in row) for row in everything.tolist()]


def test_truncate_keeps_the_first_tokens_of_long_documents(folder, tmp_path):
    made = make(folder, tmp_path / "made", documents="truncate", min_length=20)
    found = rows(made / "train.zarr") + rows(made / "heldout.zarr")
    assert sorted(found) == sorted(text(n, 3 + 3 * n)[:16].encode() for n in range(30) if 3 + 3 * n >= 20)
    assert not set(rows(made / "train.zarr")) & set(rows(made / "heldout.zarr"))
    assert verify(str(made / "train.zarr")) == []


def test_split_uses_every_token_of_train_and_only_whole_rows_of_heldout(folder, tmp_path):
    made = make(folder, tmp_path / "made", documents="split")
    documents = [text(n, 3 + 3 * n).encode() for n in range(30)]
    wholes = [d[i : i + 16] for d in documents for i in range(0, len(d) - 15, 16)]
    held = rows(made / "heldout.zarr")
    assert set(held) <= set(wholes)
    trained = rows(made / "train.zarr")
    single = [row for row in trained if row in wholes]
    assert sorted(held + single) == sorted(wholes)
    joined = [row for row in trained if row not in wholes]
    keys = np.array([shards_module._hash(f"{n:02d}.txt") for n in range(30)], np.uint64)
    in_train = [d for d, out in zip(documents, heldout(keys, 0.3), strict=True) if not out]
    left = [d[len(d) // 16 * 16 :] for d in in_train if len(d) % 16]
    assert sum(len(tail) + 1 for tail in left) // 16 == len(joined) > 3
    assert {piece for row in joined for piece in row.split(b"|")[1:-1]} <= set(left)


def test_rows_of_one_document_are_one_cluster_in_their_own_order(folder, tmp_path):
    made = make(folder, tmp_path / "made", documents="split")
    store = open_store(str(made / "heldout.zarr"))
    found = rows(made / "heldout.zarr")
    for cluster in np.unique(store.clusters):
        joined = b"".join(found[row] for row in np.flatnonzero(store.clusters == cluster))
        assert text(int(cluster), 3 + 3 * int(cluster)).encode().startswith(joined)
    assert (np.diff(store.clusters) < 0).any()  # shuffled


def test_concatenate_joins_documents_with_bos_between(folder, tmp_path):
    made = make(folder, tmp_path / "made", documents="concatenate", heldout_fraction=0.0)
    stream = b"".join(rows(made / "train.zarr"))
    documents = {text(n, 3 + 3 * n).encode() for n in range(30)}
    assert set(stream.split(b"|")[:-1]) <= documents
    assert len(stream) == (sum(map(len, documents)) + 30) // 16 * 16
    assert not (made / "heldout.zarr").exists()


def test_roll_rotates_rows(folder, tmp_path):
    plain = rows(make(folder, tmp_path / "a", seed=3) / "train.zarr")
    rolled = rows(make(folder, tmp_path / "b", seed=3, roll=True) / "train.zarr")
    shifts = [(row + row).find(other) for row, other in zip(plain, rolled, strict=True)]
    assert min(shifts) >= 0 and len(set(shifts)) > 3


def test_seed_changes_order_only(folder, tmp_path):
    first, second = (rows(make(folder, tmp_path / str(seed), seed=seed) / "train.zarr") for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.slow
def test_workers_do_not_change_a_byte(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_SIZE", 100)
    one = make(folder, tmp_path / "one", documents="split")
    source = TextFiles((str(folder),))
    request = Request(documents="split", document_length=16, chunks=(4, 8), heldout_fraction=0.3)
    two = build(source, tmp_path / "two", tokenizer=ByteTokenizer(), request=request, num_workers=2)
    assert files(one) == files(two)
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_build_continues_to_the_same_bytes(folder, tmp_path, monkeypatch):
    whole = make(folder, tmp_path / "whole", documents="split")
    monkeypatch.setattr(shards_module, "SHARD_SIZE", 100)

    class StoppedError(Exception):
        pass

    class StopAfter(Progress):
        def __init__(self, count):
            self.count = count

        def start(self, what, total):
            pass

        def advance(self, amount):
            self.count -= 1
            if self.count < 0:
                raise StoppedError

    request = Request(documents="split", document_length=16, chunks=(4, 8), heldout_fraction=0.3)
    source, output = TextFiles((str(folder),)), tmp_path / "made"
    for count in range(100):
        try:
            build(source, output, tokenizer=ByteTokenizer(), request=request, progress=StopAfter(3 * count))
            break
        except StoppedError:
            assert not output.exists()
    assert count > 5
    assert files(output) == files(whole)


def test_an_output_of_another_request_is_not_touched(folder, tmp_path):
    made = make(folder, tmp_path / "made")
    before = files(made)
    assert make(folder, tmp_path / "made") == made
    with pytest.raises(BuildError, match="holds a corpus with another request; name another folder"):
        make(folder, tmp_path / "made", seed=1)
    (folder / "00.txt").write_text("other")
    with pytest.raises(BuildError, match="holds a corpus with another source"):
        make(folder, tmp_path / "made")
    assert files(made) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(BuildError, match="exists and is no prepared corpus"):
        make(folder, tmp_path / "mine")


def test_documents_too_short_for_a_row_are_an_error(folder, tmp_path):
    with pytest.raises(BuildError, match="document_length = 1000: 30 documents give no row, the longest has 90 tokens"):
        make(folder, tmp_path / "made", document_length=1000)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "cut"}, "documents = 'cut': legal are truncate, split, concatenate, packed"),
        ({"compressor": "gzip"}, "compressor = 'gzip': legal are blosc, zstd, none"),
        ({"heldout_fraction": 1.0}, "heldout_fraction = 1.0"),
        ({"document_length": 0}, "document_length = 0"),
        ({"documents": "packed", "roll": True}, "packed documents cannot be rolled"),
    ],
)
def test_wrong_requests_are_one_line(folder, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        make(folder, tmp_path / "made", **options)


def test_more_rows_than_readers_take_are_refused_before_they_are_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sympow_jax.input_pipeline.prepare.build.MAX_ROWS", 3)
    with pytest.raises(BuildError, match=r"train: \d+ rows, and a store has at most 3; use documents=packed"):
        make(folder, tmp_path / "out", document_length=4)
    assert make(folder, tmp_path / "packed", documents="packed", document_length=4).exists()


def test_nanogpt_files_are_cut_at_end_of_text(tmp_path):
    np.array([5, 6, 50256, 50256, 7, 8, 9], "<u2").tofile(tmp_path / "a.bin")
    found = [document.content.tolist() for document in TokenFiles((str(tmp_path / "a.bin"),)).documents()]
    assert found == [[5, 6], [7, 8, 9]]


def test_default_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = time.perf_counter()
    made = default_corpus()
    assert time.perf_counter() - start < 30
    assert made.parent == tmp_path / "sympow_jax"
    train, held = (open_store(str(made / f"{split}.zarr")) for split in ("train", "heldout"))
    assert train.document_length == held.document_length == 8192
    assert train.num_documents > 500 and len(np.unique(held.clusters)) > 30
    assert default_corpus() == made
    sources = {document.content for document in PythonStdlib().documents()}
    row = held.tokenizer.decode(held.read(slice(0, 1), slice(0, 8192))[0])
    assert any(row.strip("�") in source for source in sources)
    kept = {name for name, _ in PythonStdlib().paths()}
    assert "argparse.py" in kept and "json/decoder.py" in kept
    assert not any(name.startswith(("test/", "encodings/", "pydoc_data/", "site-packages/")) for name in kept)


def test_command_line(folder, tmp_path, capsys):
    output = tmp_path / "made"
    flags = [
        "text",
        str(folder),
        f"--output={output}",
        "--documents=packed",
        "--num_workers=1",
        "--tokenizer=train:260",
    ]
    assert prepare.run([*flags, "--tokenizer=train:260"]) == 0
    assert "train.zarr: {'documents':" in capsys.readouterr().out
    store = open_packed_store(str(output / "train.zarr"), seq_len=32)
    assert store.tokenizer.vocab_size == 260 and store.tokenizer.decode(store.read(slice(0, 1), slice(0, 9))[0])
    assert prepare.run(["verify", str(output)]) == 0
    (output / "train.zarr" / "0").write_bytes(b"")
    assert prepare.run(["verify", str(output)]) == 1
    assert "chunk 0 is damaged" in capsys.readouterr().out
    assert prepare.run(["texts", "x", f"--output={output}"]) == 2
    assert capsys.readouterr().err.startswith("prepare.py: source = 'texts' with 1 inputs: use text FILE")
    assert prepare.run(["text", str(folder)]) == 2
    assert "--output: name the folder to make" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_moments_and_rerun_gives_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    inputs = tmp_path / "inputs.jsonl"
    with inputs.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"text": text(number, int(rng.integers(500, 9000)))}) + "\n")

    def command(output):
        flags = ["--documents=split", "--document_length=1024", "--chunks", "256", "256", "--num_workers=2"]
        return [sys.executable, str(ROOT / "data" / "prepare.py"), "text", str(inputs), f"--output={output}", *flags]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, capture_output=True)
    duration = time.perf_counter() - start
    kills = 0
    for _ in range(25):
        start = time.perf_counter()
        process = subprocess.Popen(
            command(tmp_path / "made"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=duration * rng.uniform(0.3, 0.9) if kills < 6 else None)
        except subprocess.TimeoutExpired:
            assert not (tmp_path / "made").exists() or verify(str(tmp_path / "made" / "train.zarr")) == []
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            if kills >= 2:
                break
            duration = time.perf_counter() - start  # this machine is faster than the first run said: begin again
            shutil.rmtree(tmp_path / "made")
    assert kills >= 2
    assert files(tmp_path / "made") == files(tmp_path / "whole")
