"""Tokenising in parallel into shard files that survive a kill, and the stream of tokens that they make up."""

import bisect
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sympow_jax.files import read_json
from sympow_jax.input_pipeline.prepare.sources import Document, Source, SourceError
from sympow_jax.input_pipeline.prepare.writer import write_json
from sympow_jax.input_pipeline.tokenizers import Tokenizer, token_dtype, tokenizer_from_files

SHARD_SIZE = 4 * 2**20  # characters (or tokens) of documents in one shard
OPEN_SHARDS = 128  # each has an open file, of which a process may have 1,024 or 256


class TokenStream:
    """All documents end to end, one BOS after each.

    keys [documents] uint64 hashes of their names, lengths and starts [documents] int64, without the BOS.
    """

    def __init__(self, paths: list[pathlib.Path], keys: np.ndarray, lengths: list[np.ndarray], dtype: np.dtype) -> None:
        self.keys = keys
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        self.starts = np.cumsum(self.lengths + 1) - (self.lengths + 1)
        self._paths = paths
        self._ends = np.cumsum([int(part.sum()) + len(part) for part in lengths]).tolist()
        self._dtype = dtype

    @functools.lru_cache(maxsize=OPEN_SHARDS)  # noqa: B019 - a stream lives as long as its build
    def _shard(self, number: int) -> np.ndarray:
        return np.memmap(self._paths[number], self._dtype, mode="r")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document."""
        number = bisect.bisect_right(self._ends, start)
        before = self._ends[number - 1] if number else 0
        return self._shard(number)[start - before : stop - before]


def tokenize(
    source: Source,
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    num_workers: int,
    advance: Callable[[int], None],
) -> TokenStream:
    """Tokenise every document of `source` into `folder`; shards that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[pathlib.Path] = []
    keys: list[np.ndarray] = []
    lengths: list[np.ndarray] = []

    def finished(path: pathlib.Path, number_of_documents: int) -> None:
        paths.append(path)
        lengths.append(np.asarray(_read_note(path)["lengths"], np.int64))
        advance(number_of_documents)

    waiting: collections.deque = collections.deque()
    with _executor(num_workers, tokenizer) as submit:
        for number, documents in enumerate(_shards(source)):
            path = folder / f"{number:06d}.tokens"
            keys.append(np.array([_hash(document.key) for document in documents], np.uint64))
            digest = _digest(documents)
            done = _note(path).exists() and _read_note(path)["sha256"] == digest
            task = None if done else submit(path, [document.content for document in documents], digest)
            waiting.append((path, task, len(documents)))
            while len(waiting) > 2 * num_workers:
                _finish_one(waiting, finished)
        while waiting:
            _finish_one(waiting, finished)
    all_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    return TokenStream(paths, all_keys, lengths, token_dtype(tokenizer.vocab_size))


def _finish_one(waiting: collections.deque, finished: Callable[[pathlib.Path, int], None]) -> None:
    path, task, count = waiting.popleft()
    if task is not None:
        task.result()
    finished(path, count)


def _shards(source: Source) -> Iterator[list[Document]]:
    documents: list[Document] = []
    size = 0
    for document in source.documents():
        documents.append(document)
        size += len(document.content)
        if size >= SHARD_SIZE:
            yield documents
            documents, size = [], 0
    if documents:
        yield documents


_Submit = Callable[[pathlib.Path, list[str | np.ndarray], str], concurrent.futures.Future | None]


@contextlib.contextmanager
def _executor(num_workers: int, tokenizer: Tokenizer) -> Iterator[_Submit]:
    """Runs tokenize_shard in `num_workers` processes, or in this one when there is just one."""
    if num_workers == 1:
        yield lambda *task: tokenize_shard(*task, tokenizer=tokenizer)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=spawn, initializer=_load_worker_tokenizer, initargs=(tokenizer.files(),)
    )
    try:
        yield lambda *task: pool.submit(_work, *task)
    except concurrent.futures.BrokenExecutor:
        raise ChildProcessError("a process that tokenises was ended, for want of memory? Use fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: list[Tokenizer] = []


def _load_worker_tokenizer(files: dict[str, bytes]) -> None:
    _worker_tokenizer[:] = [tokenizer_from_files(files)]


def _work(path: pathlib.Path, contents: list[str | np.ndarray], digest: str) -> None:
    tokenize_shard(path, contents, digest, tokenizer=_worker_tokenizer[0])


def tokenize_shard(path: pathlib.Path, contents: list[str | np.ndarray], digest: str, *, tokenizer: Tokenizer) -> None:
    """Write the tokens of some documents, BOS after each, then the note that makes the shard count as done."""
    dtype = token_dtype(tokenizer.vocab_size)
    bos = np.array([tokenizer.bos_id], dtype)
    lengths = []
    with path.open("wb") as file:
        for content in contents:
            tokens = tokenizer.encode(content) if isinstance(content, str) else _checked(content, tokenizer)
            lengths.append(len(tokens))
            file.write(np.concatenate([tokens.astype(dtype), bos]).tobytes())
    write_json(_note(path), {"sha256": digest, "lengths": lengths})


def _checked(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that a source had already; ids that are not the tokenizer's would wrap round or be refused by readers."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        raise SourceError(
            f"a document holds token {int(tokens.max())} (the smallest is {int(tokens.min())}), but the tokenizer "
            f"{tokenizer.spec['kind']} has ids 0..{tokenizer.vocab_size - 1}; name the one that made the tokens"
        )
    return tokens


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _read_note(path: pathlib.Path) -> dict[str, Any]:
    return read_json(_note(path), max_bytes=2**30)  # a shard may hold millions of empty documents


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(_name_bytes(key)).digest()[:8], "little")


def _name_bytes(key: str) -> bytes:
    """A name as the file system has it, which need not be UTF-8."""
    return key.encode("utf-8", "surrogateescape")


def _digest(documents: list[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        content = document.content
        total.update(content.encode() if isinstance(content, str) else content.tobytes())
        total.update(b"\0" + _name_bytes(document.key) + b"\0")
    return total.hexdigest()
