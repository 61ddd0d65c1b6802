"""Stores that a stranger made: metadata out of bounds, chunks that unpack to gigabytes, files that are none."""

import bz2
import gzip
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from sympow_jax.input_pipeline import StoreError, open_store
from sympow_jax.input_pipeline.prepare.verify import verify
from tests.input_pipeline.stores import random_tokens, write_store


@pytest.fixture
def path(tmp_path, rng):
    return write_store(tmp_path / "a.zarr", random_tokens(rng, (8, 64)), chunks=(8, 32), clusters=[0] * 8)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [8.0, 64]}, {"shape": [-8, 64]}, {"shape": [True, 64]}, {"shape": ["8", 64]}, {"shape": 512},
        {"shape": [10**15, 10**15]}, {"shape": [10**15, 64]}, {"shape": [2**200, 64]}, {"shape": [[8], 64]},
        {"shape": [8, 64, 1]}, {"shape": []}, {"shape": None}, {"shape": {"8": 64}},
        {"chunks": [0, 32]}, {"chunks": [8]}, {"chunks": [8, None]}, {"chunks": [2**20, 2**20]}, {"chunks": [1e300, 1]},
        {"dtype": "|O"}, {"dtype": [["a", "<u2"]]}, {"dtype": "<u2" * 99}, {"dtype": {}}, {"order": "F"},
        {"compressor": {"id": "pickle"}}, {"compressor": {"id": ["blosc"]}}, {"compressor": "blosc"},
        {"compressor": {"id": "blosc", "cname": 7}}, {"filters": [{"id": "delta"}]}, {"fill_value": "x"},
        {"dimension_separator": "/../"}, {"zarr_format": 3},
    ],
)  # fmt: skip
def test_metadata_out_of_bounds_are_one_line(path, changes):
    change(path / ".zarray", **changes)
    with pytest.raises(StoreError) as caught:
        open_store(str(path)).read(slice(0, 8), slice(0, 64))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert verify(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "257"}, "vocab_size = '257' where a whole number"),
        ({"vocab_size": 2**40}, "vocab_size = 1099511627776 is outside"),
        ({"bos_id": -1}, "bos_id = -1 is outside"),
        ({"tokenizer": "byte"}, "tokenizer = 'byte' where an object"),
        ({"clusters": [0] * 7}, "not a whole number for each of 8"),
        ({"clusters": [0.5] * 8}, "not a whole number for each of 8"),
        ({"clusters": [[0], [0, 1]] * 4}, "not a whole number for each of 8"),
        ({"clusters": [2**70] * 8}, "not a whole number for each of 8"),
        ({"clusters": {"a": 1}}, "not a whole number for each of 8"),
    ],
)
def test_attributes_of_the_wrong_kind_are_named(path, changes, message):
    change(path / ".zattrs", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        _ = open_store(str(path)).clusters
    assert "\n" not in str(caught.value) and verify(str(path))


@pytest.mark.parametrize("content", [b"[" * 3000 + b"]" * 3000, b"[]", b'{"chunks": 7}', b'{"counts": []}', b"\xff"])
def test_a_manifest_of_the_wrong_kind_is_named(path, content):
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json: ") as caught:
        open_store(str(path))
    assert "\n" not in str(caught.value)


def test_manifest_entries_are_never_paths(path):
    digests = json.loads((path / "manifest.json").read_text())["chunks"]
    (path / "manifest.json").write_text(json.dumps({"chunks": digests | {"../../x": "0", "/etc/passwd": ["a"]}}))
    assert open_store(str(path)).read(slice(0, 8), slice(0, 64)).shape == (8, 64)
    assert "other names or number" in verify(str(path))[0]


BLOSC_BOMB = bytes([2, 1, 0x21, 2]) + (2**32 - 17).to_bytes(4, "little") + bytes(8)
READ = """
import sys
from sympow_jax.input_pipeline import open_store
for path in sys.argv[1:]:
    try:
        open_store(path).read(slice(0, 1), slice(32, 33))
    except ValueError as error:
        print(error)
print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
"""


@pytest.mark.slow
def test_chunks_that_unpack_to_gigabytes_take_no_memory(tmp_path, rng):
    paths, zeros = [], bytes(2**28)
    zstd = bytes.fromhex("28b52ffd0058") + b"\x02\x00\x10\0" * 7999 + b"\x03\x00\x10\0"  # blocks of 128 KiB
    packed = {
        "zstd": zstd,
        "gzip": gzip.compress(zeros),
        "zlib": zlib.compress(zeros),
        "bz2": bz2.compress(zeros),
    }
    for compressor, content in ({"blosc": BLOSC_BOMB} | packed).items():
        path = write_store(tmp_path / compressor, random_tokens(rng, (8, 64)), chunks=(8, 32), manifest=False)
        if compressor != "blosc":
            change(path / ".zarray", compressor={"id": compressor, "level": 1})
        (path / "0.1").write_bytes(content)
        paths.append(str(path))
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=True)
    *errors, peak_kib = done.stdout.splitlines()
    assert [error.split("chunk 0.1 ")[1].split("(")[0] for error in errors] == ["cannot be decoded "] * len(paths)
    assert int(peak_kib) < 300 * 1024


def test_a_blosc_header_that_claims_more_than_a_chunk_is_refused(path):
    (path / "manifest.json").unlink()
    (path / "0.1").write_bytes(BLOSC_BOMB)
    with pytest.raises(StoreError, match=r"chunk 0\.1 cannot be decoded \(it has 4,294,967,279 bytes, and a chunk 512"):
        open_store(str(path)).read(slice(0, 1), slice(32, 33))


def test_chunks_that_are_no_files_or_too_large_are_named(path):
    (path / "manifest.json").unlink()
    store = open_store(str(path))
    (path / "0.0").unlink()
    os.mkfifo(path / "0.0")
    with (path / "0.1").open("r+b") as file:
        file.truncate(2**40)  # sparse
    for column, message in ((0, "no regular file"), (32, r"at most [0-9,]+ are read")):
        with pytest.raises(StoreError, match=message):
            store.read(slice(0, 8), slice(column, column + 32))


def test_a_chunk_larger_than_the_cache_is_refused(path):
    with pytest.raises(StoreError, match=r"takes 512 bytes, more than data\.cache_bytes = 511"):
        open_store(str(path), cache_bytes=511)
    assert open_store(str(path), cache_bytes=512).read(slice(0, 8), slice(0, 32)).dtype == np.uint16
