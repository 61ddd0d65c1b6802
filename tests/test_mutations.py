"""Files of a workdir, a store and a saved state, mutated at random: one-line errors or right results, and no more."""

import json
import os
import pathlib
import random
import shutil
import types

import jax
import numpy as np
import pytest

from sympow_jax import generation, report
from sympow_jax.command_line import USER_ERRORS
from sympow_jax.input_pipeline import open_store
from sympow_jax.input_pipeline.tokenizers import load_tokenizer, train_bpe
from sympow_jax.loading import load_step
from sympow_jax.training.metrics import last_logged_step, read_metrics
from tests.input_pipeline.stores import random_tokens, write_store
from tests.test_generate import make_run

MEMORY = 2**30
TEXT = "the cat sat on the mat, 1 2 3"
VALUES = [
    None, True, -1, 0, 0.5, 1e308, 10**15, 2**70, -(2**70), "", "x", "../../outside/file", "/outside/file", "\x1b[2J",
    "<script>", "a" * 10_000, [], {}, [[]], [{}], {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A store, a tokenizer and metrics of a run, and what is right for each."""
    root = tmp_path_factory.mktemp("mutations")
    tokens = random_tokens(np.random.default_rng(0), (8, 64))
    write_store(root / "whole" / "store", tokens, chunks=(8, 32), clusters=[0] * 8)
    tokenizer = train_bpe([TEXT] * 4, vocab_size=270)
    tokenizer.save(root / "whole" / "tokenizer")
    rows = [{"step": i, "tokens": 16 * i, "loss": 5.0 - 0.1 * i} for i in range(1, 9)]
    (root / "whole" / "log").mkdir()
    (root / "whole" / "log" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "outside").mkdir()
    (root / "outside" / "file").write_text('{"a": 1}')
    return types.SimpleNamespace(root=root, tokens=tokens, ids=tokenizer.encode(TEXT), rows=rows)


@pytest.fixture(scope="module")
def subject(files):
    """With a checkpoint and a saved state."""
    whole = files.root / "whole"
    make_run(whole / "run", "sympow", "data.seq_len=16", "evaluation.lengths=16")
    model, params, _ = load_step(str(whole / "run"))
    decoder = generation.Decoder(model, params)
    stream = decoder.start(1, 8)
    stream.tokens_read, stream.logits = 4, jax.numpy.zeros((1, model.vocab_size))
    generation.save_state(whole / "state", decoder, stream, params)
    return types.SimpleNamespace(**vars(files), decoder=decoder, params=params)


def read_store(case, folder):
    store = open_store(str(folder / "store"), cache_bytes=2**26)
    read = store.read(slice(0, store.num_documents), slice(0, store.document_length))
    np.testing.assert_array_equal(read, case.tokens[: read.shape[0], : read.shape[1]])
    assert len(store.clusters) == store.num_documents


def read_run(case, folder):
    _, params, step = load_step(str(folder / "run"))
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    assert step == 1


def read_tokenizer(case, folder):
    np.testing.assert_array_equal(load_tokenizer(folder / "tokenizer").encode(TEXT), case.ids)


def read_rows(case, folder):
    path = folder / "log" / "metrics.jsonl"
    rows = read_metrics(path)
    assert len(rows) <= len(case.rows) and all(type(row["step"]) is int for row in rows)
    assert last_logged_step(folder / "log") == max((row["step"] for row in rows), default=0)
    training = report._training(folder / "log")
    assert all(isinstance(loss, int | float | None) for loss in training["loss"])


def read_state(case, folder):
    stream = generation.load_state(folder / "state", case.decoder, case.params, batch_size=1, extra_length=4)
    assert stream.tokens_read == 4 and not np.any(stream.logits)


FILES = {
    "log/metrics.jsonl": read_rows,
    "store/.zarray": read_store,
    "store/.zattrs": read_store,
    "store/manifest.json": read_store,
    "store/0.1": read_store,
    "tokenizer/tokenizer.json": read_tokenizer,
    "tokenizer/spec.json": read_tokenizer,
}
TARGETS = {
    "run/config.json": read_run,
    "run/data.json": read_run,
    "run/checkpoints/1/manifest/metadata": read_run,
    "run/checkpoints/1/state/_METADATA": read_run,
    "run/checkpoints/1/state/manifest.ocdbt": read_run,
    **FILES,
    "state/state.json": read_state,
    "state/state.npz": read_state,
}


def mutate(path: pathlib.Path, rng: random.Random, outside: pathlib.Path) -> str:
    """Changes the file in one of many ways; returns which."""
    content = bytearray(path.read_bytes())
    way = rng.choice(["flip", "flip", "truncate", "value", "value", "value", "value", "key", "nest", "link", "other"])
    try:
        value = json.loads(content.splitlines()[0] if path.suffix == ".jsonl" else content)
    except ValueError:
        value = None
    if way == "link":
        path.unlink()
        path.symlink_to(outside / "file")
    elif way == "other":
        path.unlink()
        rng.choice([path.mkdir, lambda: os.mkfifo(path), lambda: make_sparse(path)])()
    elif way == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif way == "nest":
        path.write_bytes(b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}")
    elif way in ("value", "key") and isinstance(value, dict) and value:
        node, key = rng.choice(list(places(value)))
        if way == "key":
            del node[key]
        else:
            node[key] = rng.choice(VALUES)
        rest = b"".join(bytes(content).splitlines(keepends=True)[1:]) if path.suffix == ".jsonl" else b""
        path.write_bytes(json.dumps(value).encode() + b"\n" + rest)
    else:
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
    return way


def make_sparse(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)


def places(node):
    """(container, key) of every value below."""
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(item, dict | list):
            yield from places(item)


def peak_bytes() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def check(case, tmp_path, numbers, targets):
    reset = pathlib.Path("/proc/self/clear_refs")
    reset.write_text("5")  # the peak begins anew
    before = peak_bytes()
    outcomes = {"error": 0, "right": 0}
    for number in numbers:
        rng = random.Random(number)
        target = list(targets)[number % len(targets)]
        folder = tmp_path / "subject"
        shutil.copytree(case.root / "whole", folder)
        way = mutate(folder / target, rng, case.root / "outside")
        what = f"mutation {number}: {way} of {target}"
        try:
            targets[target](case, folder)
            outcomes["right"] += 1
        except USER_ERRORS as error:
            assert target.startswith("run/checkpoints") or "\n" not in str(error), (what, error)
            outcomes["error"] += 1
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert [path.name for path in tmp_path.iterdir()] == ["subject"], what
        assert [path.name for path in (case.root / "outside").iterdir()] == ["file"], what
        assert (case.root / "outside" / "file").read_text() == '{"a": 1}', what
        shutil.rmtree(folder)
    assert peak_bytes() - before < MEMORY
    return outcomes


def test_two_dozen_mutations_of_stores_tokenizers_and_metrics(files, tmp_path):
    outcomes = check(files, tmp_path, range(24), FILES)
    assert outcomes["error"] >= 12, outcomes


@pytest.mark.slow
def test_two_hundred_mutations(subject, tmp_path):
    outcomes = check(subject, tmp_path, range(24, 232), TARGETS)
    assert outcomes["error"] >= 120 and outcomes["right"] >= 10, outcomes


@pytest.mark.slow
def test_a_changed_number_in_a_saved_state_is_seen(subject, tmp_path):
    folder = shutil.copytree(subject.root / "whole" / "state", tmp_path / "state")
    about = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(about | {"tokens_read": 5}))
    with pytest.raises(ValueError, match=r"state\.json is not the one that was saved"):
        generation.load_state(folder, subject.decoder, subject.params, batch_size=1, extra_length=4)
