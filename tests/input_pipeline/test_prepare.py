"""data/prepare.py: the order of its flags, and what goes wrong on a machine, each in one line."""

import concurrent.futures
import json
import resource
import signal

import pytest

from sympow_jax import prepare
from sympow_jax.input_pipeline import open_store
from sympow_jax.input_pipeline.prepare.build import BuildError, Request, build
from sympow_jax.input_pipeline.prepare.progress import Progress
from sympow_jax.input_pipeline.prepare.text_files import TextFiles
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer

FLAGS = ["--document_length=8", "--num_workers=1", "--heldout_fraction=0", "--compressor=none"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """inputs/ with one document of 4,000 letters, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "a.txt").write_text("abcdefgh" * 500)
    return tmp_path


def refused(arguments, capsys) -> str:
    """The one line that a refused command prints."""
    assert prepare.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "arguments",
    [
        ["text", "--output=made", *FLAGS, "inputs"],
        ["--output=made", "text", "inputs", *FLAGS],
        ["text", "inputs", "--output", "made", *FLAGS],
        [*FLAGS, "--chunks", "4", "8", "--output=made", "text", "inputs"],
    ],
)
def test_flags_may_stand_anywhere(arguments, folder):
    assert prepare.run(arguments) == 0
    assert open_store("made/train.zarr").num_documents == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "inputs", "--bogus"], "unrecognized arguments: --bogus; see --help"),
        (["text", "inputs", "--doc=packed"], "unrecognized arguments: --doc=packed"),
        (["text", "inputs", "--seed=x"], "argument --seed: invalid int value: 'x'"),
        ([], "the following arguments are required: source"),
        (["text", "inputs", "--output=o", "--num_workers=0"], "num_workers = 0: must be at least 1"),
        (["text", "inputs", "--output=o", f"--document_length={10**20}"], "document_length = 1000"),
        (["text", "inputs", "--output=inputs/made"], "--output = 'inputs/made': lies inside the input 'inputs'"),
        (["text", ".", "--output=made"], "--output = 'made': lies inside the input '.'"),
        (["text", "inputs", "--output=inputs/a.txt/made", *FLAGS[:2]], "lies inside"),
        (["text", "inputs/a.txt", "--output=inputs/a.txt/made", *FLAGS], "cannot be made (FileExistsError"),
        (["text", "inputs/a.txt", "--output=/proc/none/made", *FLAGS], "cannot be made (FileNotFoundError"),
        (["python-stdlib", "inputs", "--output=o"], "'inputs': python-stdlib reads no files"),
        (["tfds:lm1b", "--field=body", "--output=o"], "--field = 'body': only text has fields"),
        (["text", "inputs", "--documents=packed", "--chunks", "4", "8", "--output=o"], "--chunks: packed documents"),
        (["text", "inputs", "--output=gs://bucket/o"], "--output = 'gs://bucket/o': is an address"),
        (["text", "inputs", "--output=caf\udce9"], "its path is no UTF-8"),
        (["verify", "caf\udce9"], "its path is no UTF-8"),
        (["text", "inputs", "--output=o", "--tokenizer=train:256"], "trained of 257, the bytes and <|endoftext|>, to"),
        (["text", "inputs", "--output=o", f"--tokenizer=train:{10**20}"], "to 16,777,216 ids"),
    ],
)
def test_wrong_commands_are_one_line(arguments, message, folder, capsys):
    assert message in refused(arguments, capsys)
    assert sorted(path.name for path in (folder / "inputs").iterdir()) == ["a.txt"]
    assert not (folder / "gs:").exists()


def test_an_output_of_the_reader_that_took_every_byte_for_text_is_not_believed(folder, capsys):
    command = ["text", "inputs", "--output=made", *FLAGS]
    assert prepare.run(command) == prepare.run(command) == 0
    manifest = folder / "made" / "manifest.json"
    described = json.loads(manifest.read_text())
    del described["source"]["reader"]
    manifest.write_text(json.dumps(described))
    capsys.readouterr()
    assert "holds a corpus with another source" in refused(command, capsys)


class Full(Progress):
    """A disk that is full from the moment that a stage begins: files may hold `size` bytes."""

    def __init__(self, stage: str, size: int) -> None:
        self.stage, self.size = stage, size

    def start(self, what: str, total: int | None) -> None:
        if what == self.stage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("stage", "size"), [("tokenising", 1000), ("writing train", 1000)])
def test_a_full_disk_is_one_line_and_the_same_command_continues(stage, size, folder):
    request = Request(documents="split", document_length=8, heldout_fraction=0.0, compressor="none")
    options = {"tokenizer": ByteTokenizer(), "request": request}
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    try:
        with pytest.raises(ValueError, match=r"File too large") as caught:
            build(TextFiles(("inputs",)), "made", **options, progress=Full(stage, size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "\n" not in str(caught.value) and "made" in str(caught.value)
    assert not (folder / "made").exists()
    store = open_store(str(build(TextFiles(("inputs",)), "made", **options) / "train.zarr"))
    tokens = store.read(slice(0, store.num_documents), slice(0, 8))
    assert store.num_documents == 500 and {bytes(row.tolist()) for row in tokens} == {b"abcdefgh"}


def test_a_worker_that_is_killed_is_one_line(folder, monkeypatch):
    class Killed(concurrent.futures.ProcessPoolExecutor):
        def submit(self, *arguments):
            raise concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Killed)
    with pytest.raises(BuildError, match=r"a process that tokenises was ended, for want of memory\? Use fewer workers"):
        build(TextFiles(("inputs",)), "made", tokenizer=ByteTokenizer(), request=Request(), num_workers=2)
    assert not (folder / "made").exists()
