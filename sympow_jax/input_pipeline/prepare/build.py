"""Any source of documents -> train.zarr and heldout.zarr, in parallel, resumable after a kill, atomic.

Everything is made in `OUTPUT.partial` and appears as `OUTPUT` by one rename. The stores are a pure function of the
documents and the request: the number of workers, kills and restarts do not change a byte.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from sympow_jax.files import json_sha256, one_line, read_json
from sympow_jax.input_pipeline.chunked_array import MANIFEST
from sympow_jax.input_pipeline.hashing import random_bits
from sympow_jax.input_pipeline.packing import OFFSETS
from sympow_jax.input_pipeline.prepare.layout import Layout, arrange
from sympow_jax.input_pipeline.prepare.progress import Progress
from sympow_jax.input_pipeline.prepare.shards import TokenStream, tokenize
from sympow_jax.input_pipeline.prepare.sources import Source
from sympow_jax.input_pipeline.prepare.verify import verify
from sympow_jax.input_pipeline.prepare.writer import COMPRESSORS, Format, finish_store, write_array, write_json
from sympow_jax.input_pipeline.tokenizers import Tokenizer, token_dtype

VERSION = 1
DOCUMENTS = ("truncate", "split", "concatenate", "packed")
SPLITS = ("train", "heldout")
MAX_ROWS = 5_000_000  # .zattrs keeps a number for each, of up to 12 bytes, and readers take 64 MiB of it
_MOST = 2**40  # tokens, of which int64 arithmetic can count a few million times as many


class BuildError(ValueError):
    """A request that cannot be met, or an output that is in the way."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How documents become rows.

    documents: "truncate" keeps the first `document_length` tokens of each and drops shorter ones (LongCrawl64);
      "split" cuts each into as many whole rows as it gives and joins what is left over into further rows, in train
      only, so that a heldout row is always one document; "concatenate" joins all documents, BOS after each, and cuts
      the stream; "packed" writes a flat store of whole documents with their offsets.
    min_length: shorter documents (in tokens) are dropped. heldout_fraction: share of documents, drawn by a hash of
    their names. roll: rotate each row by a random amount, as LongCrawl64 does.
    """

    documents: str = "truncate"
    document_length: int = 65536
    min_length: int = 1
    heldout_fraction: float = 0.01
    seed: int = 0
    roll: bool = False
    chunks: tuple[int, int] = (2048, 2048)
    compressor: str = "blosc"

    def check(self) -> None:
        """Raise BuildError for a value that makes no sense."""
        positive = {"document_length": self.document_length, "min_length": self.min_length, "chunks": min(self.chunks)}
        for name, value in positive.items():
            if not 1 <= value <= _MOST:
                raise BuildError(f"{name} = {value}: must be between 1 and {_MOST}")
        if self.documents not in DOCUMENTS:
            raise BuildError(f"documents = {self.documents!r}: legal are {', '.join(DOCUMENTS)}")
        if self.compressor not in COMPRESSORS:
            raise BuildError(f"compressor = {self.compressor!r}: legal are {', '.join(COMPRESSORS)}")
        if not 0 <= self.heldout_fraction < 1:
            raise BuildError(f"heldout_fraction = {self.heldout_fraction}: must be in [0, 1)")
        if self.roll and self.documents == "packed":
            raise BuildError("roll = True: packed documents cannot be rolled; use truncate, split or concatenate")


def build(
    source: Source,
    output: str | pathlib.Path,
    *,
    tokenizer: Tokenizer,
    request: Request,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Make `output`/train.zarr and `output`/heldout.zarr, continue where a killed build stopped, or find them made."""
    request.check()
    if num_workers < 1:
        raise BuildError(f"num_workers = {num_workers}: must be at least 1")
    output = pathlib.Path(output)
    progress = progress or Progress()
    described = {
        "version": VERSION,
        "source": source.describe(),
        "request": dataclasses.asdict(request) | {"chunks": list(request.chunks)},
        "tokenizer": tokenizer.spec,
        "tokenizer_sha256": tokenizer.digest,
    }
    if _is_done(output, described):
        return output
    work = output.with_name(output.name + ".partial")
    with _one_line(output), _locked(output.with_name(output.name + ".lock")):
        if _is_done(output, described):
            return output
        _prepare_work(work, described)
        dtype = token_dtype(tokenizer.vocab_size)
        progress.start("tokenising", None)
        stream = tokenize(source, work / "shards", tokenizer, num_workers=num_workers, advance=progress.advance)
        made = work / "made"
        for split in SPLITS:
            _write_split(split, stream, made, work, tokenizer, request, described, dtype, progress)
        if not any((made / f"{split}.zarr").exists() for split in SPLITS):
            longest = int(stream.lengths.max(initial=0))
            raise BuildError(
                f"document_length = {request.document_length}: {len(stream.lengths)} documents give no row, "
                f"the longest has {longest} tokens; use a smaller length, or documents=concatenate"
            )
        _refuse_unsound(made, work, progress)
        write_json(made / "manifest.json", described)
        os.rename(made, output)
        shutil.rmtree(work)
    return output


def _refuse_unsound(made: pathlib.Path, work: pathlib.Path, progress: Progress) -> None:
    """Read the stores as training will; if they are not sound, throw the work away, so that a rerun begins anew."""
    stores = [made / f"{split}.zarr" for split in SPLITS if (made / f"{split}.zarr").exists()]
    faults = [fault for store in stores for fault in verify(str(store), progress=progress)]
    if faults:
        shutil.rmtree(work)
        raise BuildError(f"output: what was written cannot be read, so nothing is kept: {faults[0]}")


def _write_split(
    split: str,
    stream: TokenStream,
    made: pathlib.Path,
    work: pathlib.Path,
    tokenizer: Tokenizer,
    request: Request,
    described: dict[str, Any],
    dtype: np.dtype,
    progress: Progress,
) -> None:
    chosen = np.flatnonzero(heldout(stream.keys, request.heldout_fraction) == (split == "heldout"))
    layout = arrange(
        stream, chosen, request.documents, request.document_length, request.min_length, request.seed, split
    )
    if layout.num_rows == 0:
        return
    folder = made / f"{split}.zarr"
    packed = request.documents == "packed"
    if not packed and layout.num_rows > MAX_ROWS:
        raise BuildError(
            f"{split}: {layout.num_rows:,} rows, and a store has at most {MAX_ROWS:,}; use documents=packed, a larger "
            "document_length, or several outputs"
        )
    if packed:
        total = layout.num_tokens
        # about 2 million tokens a chunk, and whole windows of every power of two
        layout_format = Format((total,), (min(total, 2**21),), dtype.str, request.compressor)
        rows = lambda start, stop: layout.tokens(stream, start, stop).astype(dtype)  # noqa: E731
    else:
        chunks = (min(request.chunks[0], layout.num_rows), min(request.chunks[1], request.document_length))
        layout_format = Format((layout.num_rows, request.document_length), chunks, dtype.str, request.compressor)
        rolls = _rolls(request, split, layout.num_rows)
        rows = lambda start, stop: _rows(layout, stream, start, stop, rolls, dtype)  # noqa: E731
    progress.start(f"writing {split}", layout_format.shape[0])
    digests = write_array(folder, layout_format, rows, ledger=work / f"{split}.done", advance=progress.advance)
    attributes = {"tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id}
    counts = {
        "documents": len(chosen),
        "documents_used": len(np.unique(layout.documents)),
        "rows": 1 if packed else layout_format.shape[0],
        "tokens": int(np.prod(layout_format.shape)),
    }
    finish_store(
        folder,
        attributes=attributes if packed else attributes | {"clusters": layout.clusters().tolist()},
        manifest=described | {"split": split, "counts": counts},
        digests=digests,
        tokenizer=tokenizer,
        extra_files={OFFSETS: layout.offsets().astype("<i8").tobytes()} if packed else None,
    )


def read_counts(store: pathlib.Path) -> dict[str, int]:
    """Documents, rows and tokens of a prepared store, from its manifest; empty if there is none."""
    manifest = store / MANIFEST
    return read_json(manifest)["counts"] if manifest.exists() else {}


def heldout(keys: np.ndarray, fraction: float) -> np.ndarray:
    """[documents] bool: whether each document is held out, from the 64-bit hashes of their names."""
    return keys < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def _rows(
    layout: Layout, stream: TokenStream, start: int, stop: int, rolls: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
    rows = np.empty((stop - start, layout.document_length), dtype)
    for i, row in enumerate(range(start, stop)):
        tokens = layout.row(stream, row)
        rows[i] = tokens if rolls is None else np.roll(tokens, rolls[row])
    return rows


def _rolls(request: Request, split: str, num_rows: int) -> np.ndarray | None:
    if not request.roll:
        return None
    bits = random_bits(request.seed, 2 + SPLITS.index(split), num_rows)
    return (bits % np.uint64(request.document_length)).astype(np.int64)


def _is_done(output: pathlib.Path, described: dict[str, Any]) -> bool:
    if not output.exists():
        return False
    try:
        found = read_json(output / "manifest.json")
    except (OSError, ValueError):
        raise BuildError(f"output = {str(output)!r}: exists and is no prepared corpus; name another folder") from None
    differing = sorted(name for name in {*found, *described} if found.get(name) != described.get(name))
    if differing:
        raise BuildError(
            f"output = {str(output)!r}: holds a corpus with another {', '.join(differing)}; "
            "name another folder or remove it"
        )
    return True


def _prepare_work(work: pathlib.Path, described: dict[str, Any]) -> None:
    """Keep the unfinished work of the same request, throw away that of another."""
    request = work / "request.json"
    text = json_sha256(described)
    if work.exists() and not (request.exists() and read_json(request, kind=str) == text):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(request, text)


@contextlib.contextmanager
def _one_line(output: pathlib.Path) -> Iterator[None]:
    """What the system refuses (a full disk, no permission) as one line; finished parts stay for the next try."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"output = {str(output)!r}: cannot be made ({one_line(error)}); mend it and give the same command again, "
            "which continues"
        ) from None


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One builder at a time; the lock goes with the process, so a killed one leaves none behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
