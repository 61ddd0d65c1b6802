"""The built-in corpora: the running Python's standard library as bytes, built once into the user's cache folder."""

import os
import pathlib

from sympow_jax.files import json_sha256
from sympow_jax.input_pipeline.prepare.build import VERSION, BuildError, Request, build
from sympow_jax.input_pipeline.prepare.import_graph import PythonImports
from sympow_jax.input_pipeline.prepare.sources import PythonStdlib, Source
from sympow_jax.input_pipeline.tokenizers import ByteTokenizer

STDLIB_NAME = "python-stdlib"
# Rows of 8,192 bytes: 16 times a training length of 512, and about a third of the files have at least one
STDLIB_REQUEST = Request(documents="split", document_length=8192, heldout_fraction=0.2, chunks=(64, 2048))

IMPORTS_NAME = "python-imports"
IMPORTS_REQUEST = Request(documents="split", document_length=16_384, heldout_fraction=0.2, chunks=(64, 2048))
BUILT_IN = {STDLIB_NAME: STDLIB_REQUEST, IMPORTS_NAME: IMPORTS_REQUEST}


def built_in_source(name: str) -> Source:
    """The documents of a name of BUILT_IN."""
    return PythonImports() if name == IMPORTS_NAME else PythonStdlib()


def cache_folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/sympow_jax, by default ~/.cache/sympow_jax.

    Raises:
      FileNotFoundError: the user has no home folder, and the variable is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return pathlib.Path(base) / "sympow_jax"
    try:
        return pathlib.Path.home() / ".cache" / "sympow_jax"
    except RuntimeError:  # a user id that no account has, and HOME is not set
        raise FileNotFoundError("no home folder to keep files in; set XDG_CACHE_HOME") from None


def default_corpus(cache_dir: str | pathlib.Path | None = None, *, name: str = STDLIB_NAME) -> pathlib.Path:
    """The folder with `train.zarr` and `heldout.zarr`, made in seconds if absent.

    Its name holds the Python version and a digest of the library's sources, since both decide the content.
    """
    source, request = built_in_source(name), BUILT_IN[name]
    described = source.describe()
    made = f"python-{described['python']}-{json_sha256([VERSION, described, str(request)])[:12]}"
    folder = pathlib.Path(cache_dir) if cache_dir is not None else cache_folder()
    try:
        return build(source, folder / made, tokenizer=ByteTokenizer(), request=request)
    except (OSError, BuildError) as error:
        raise OSError(
            f"data {name}: cannot be kept in {folder} ({error}); set XDG_CACHE_HOME to a folder that can be "
            "written, or name a store of your own"
        ) from None
