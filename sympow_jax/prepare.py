"""Any text into a store to train on, and a check of one.

    python data/prepare.py python-stdlib --output=DIR
    python data/prepare.py text FILE FOLDER 'GLOB/*.jsonl.gz' --output=DIR --tokenizer=gpt2:VOCABULARY_FOLDER
    python data/prepare.py nanogpt train.bin --output=DIR --tokenizer=gpt2:VOCABULARY_FOLDER
    python data/prepare.py 'tfds:NAME?split=train&field=text' --output=DIR
    python data/prepare.py verify DIR_OR_STORE ...

DIR gets train.zarr and heldout.zarr. A killed run continues when the same command is given again.
"""

import argparse
import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sympow_jax.command_line import run_program
from sympow_jax.files import check_folder_name, printable
from sympow_jax.input_pipeline import tfds, tokenizers
from sympow_jax.input_pipeline.prepare import build, corpus, sources, text_files, token_source, verify
from sympow_jax.input_pipeline.tokenizer_base import MAX_VOCABULARY

DEFAULTS = build.Request()
LEAST_BPE = 257
TOKENIZER_HELP = (
    "byte, gpt2[:FOLDER], gpt2-json[:FOLDER], a tokenizer.json, a Hugging Face tokenizer's folder, or train:VOCAB_SIZE "
    "(default byte; for nanogpt the one in tokenizer/ beside the file, else gpt2)"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the program: one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message}; see --help")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; flags may stand before, between and after the inputs."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", help="text, python-stdlib, python-imports, nanogpt, tfds:NAME, or verify")
    parser.add_argument(
        "inputs", nargs="*", help="files, folders and globs (text), files of tokens (nanogpt), stores (verify)"
    )
    parser.add_argument("--output", help="folder to make")
    parser.add_argument("--tokenizer", help=TOKENIZER_HELP)
    parser.add_argument(
        "--dtype", default="", help="number type of raw tokens (nanogpt), such as int32; default uint16"
    )
    parser.add_argument("--field", help="the text field of JSON, or column of a table (text; default text)")
    parser.add_argument("--documents", choices=build.DOCUMENTS, help=f"default {DEFAULTS.documents}")
    parser.add_argument("--document_length", type=int, help=f"tokens in a row (default {DEFAULTS.document_length})")
    parser.add_argument("--min_length", type=int, help="drop documents of fewer tokens (default 1)")
    parser.add_argument("--heldout_fraction", type=float, help=f"default {DEFAULTS.heldout_fraction}")
    parser.add_argument("--seed", type=int, help="of the shuffle and the roll (default 0)")
    parser.add_argument("--roll", action="store_true", default=None, help="rotate rows at random, as LongCrawl64 does")
    parser.add_argument("--chunks", type=int, nargs=2, help="rows and columns of a chunk (default 2048 2048)")
    parser.add_argument("--compressor", choices=sorted(build.COMPRESSORS), help="default blosc (lz4, level 5, shuffle)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    return parser.parse_intermixed_args(arguments)


def make_source(flags: argparse.Namespace) -> sources.Source:
    """The source that the command line names."""
    if flags.field and flags.source != "text":
        raise sources.SourceError(f"--field = {flags.field!r}: only text has fields of JSON and columns to choose from")
    if flags.inputs and (flags.source in corpus.BUILT_IN or flags.source.startswith(tfds.PREFIX)):
        raise sources.SourceError(
            f"{flags.inputs[0]!r}: {flags.source} reads no files; leave it out, or use text FILE ..."
        )
    if flags.source.startswith(tfds.PREFIX):
        return tfds.TfdsSource(flags.source)
    if flags.source in corpus.BUILT_IN:
        return corpus.built_in_source(flags.source)
    if flags.dtype and flags.source != "nanogpt":
        raise sources.SourceError(f"--dtype = {flags.dtype!r}: only nanogpt reads raw tokens")
    if flags.source == "text" and flags.inputs:
        refuse_output_inside(flags.output, flags.inputs)
        return text_files.TextFiles(tuple(flags.inputs), flags.field or "text")
    if flags.source == "nanogpt" and flags.inputs:
        return token_source.TokenFiles(tuple(flags.inputs), flags.dtype)
    raise sources.SourceError(
        f"source = {flags.source!r} with {len(flags.inputs)} inputs: use text FILE ..., python-stdlib, "
        "nanogpt FILE ..., tfds:NAME or verify STORE ..."
    )


def refuse_output_inside(output: str, inputs: list[str]) -> None:
    """Raise SourceError where the next run would read what this one writes."""
    for folder in filter(os.path.isdir, inputs):
        if pathlib.Path(output).resolve().is_relative_to(pathlib.Path(folder).resolve()):
            raise sources.SourceError(f"--output = {output!r}: lies inside the input {folder!r}; name a folder outside")


def make_tokenizer(name: str | None, source: sources.Source) -> tokenizers.Tokenizer:
    """The tokenizer that the command line names, or the source's own; `train:VOCAB_SIZE` trains one on the source."""
    if not name:
        is_tokens = isinstance(source, token_source.TokenFiles)
        return source.default_tokenizer() if is_tokens else tokenizers.load_tokenizer("byte")
    kind, _, size = name.partition(":")
    if kind == "train" and size.isdecimal():
        if not LEAST_BPE <= int(size) <= MAX_VOCABULARY:
            legal = f"{LEAST_BPE:,}, the bytes and <|endoftext|>, to {MAX_VOCABULARY:,}"
            raise sources.SourceError(f"--tokenizer = {name!r}: a vocabulary is trained of {legal} ids")
        if isinstance(source, token_source.TokenFiles):
            raise sources.SourceError(f"--tokenizer = {name!r}: files of tokens hold no text to train on; name theirs")
        texts = (document.content for document in source.documents())
        return tokenizers.train_bpe((text for text in texts if isinstance(text, str)), vocab_size=int(size))
    return tokenizers.load_tokenizer(name)


def make_request(flags: argparse.Namespace) -> build.Request:
    """The request: given flags over the source's defaults."""
    base = corpus.BUILT_IN.get(flags.source, DEFAULTS)
    names = [field.name for field in dataclasses.fields(build.Request)]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if "chunks" in given:
        given["chunks"] = tuple(given["chunks"])
    request = dataclasses.replace(base, **given)
    unused = [name for name in ("document_length", "chunks") if name in given and request.documents == "packed"]
    if unused:
        raise build.BuildError(f"--{unused[0]}: packed documents have no rows; leave it out, or use split or truncate")
    return request


class Bar(build.Progress):
    """A progress bar on the terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = None

    def start(self, what: str, total: int | None) -> None:
        """A stage begins."""
        self._task = self._progress.add_task(what, total=total)

    def advance(self, amount: int) -> None:
        """Part of it is done."""
        if self._task is not None:
            self._progress.advance(self._task, amount)


def run_verify(addresses: list[str], progress: build.Progress) -> int:
    """Check stores, or the train.zarr and heldout.zarr of folders; 0 if all are sound."""
    if not addresses:
        raise sources.SourceError("verify: name at least one store or prepared folder")
    sound = True
    for address in addresses:
        inside = [str(path) for path in sorted(pathlib.Path(address).glob("*.zarr"))]
        for store in inside or [address]:
            faults = verify.verify(store, progress=progress)
            print(printable("\n".join(faults)) if faults else f"{store}: sound")
            sound &= not faults
    return 0 if sound else 1


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        flags = parse_arguments(arguments)
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            if flags.source == "verify":
                return run_verify(flags.inputs, Bar(progress))
            if not flags.output:
                raise build.BuildError("--output: name the folder to make")
            check_folder_name(flags.output, "--output")
            source = make_source(flags)
            tokenizer = make_tokenizer(flags.tokenizer, source)
            if isinstance(source, token_source.TokenFiles):
                source = source.cut_for(tokenizer)
            made = build.build(
                source,
                flags.output,
                tokenizer=tokenizer,
                request=make_request(flags),
                num_workers=flags.num_workers,
                progress=Bar(progress),
            )
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"prepare.py: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: stopped; the same command continues", file=sys.stderr)
        return 130
    for split in build.SPLITS:
        counts = build.read_counts(made / f"{split}.zarr")
        print(f"{made / split}.zarr: {counts}" if counts else f"{split}: no rows")
    return 0


def main() -> None:
    """Runs the command on this process's flags and exits."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)  # a library set its own
    run_program(run, keep_memory=False)


if __name__ == "__main__":
    main()
