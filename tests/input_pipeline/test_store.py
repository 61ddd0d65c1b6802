import json
import logging

import numpy as np
import pytest
import tensorstore as ts
import zarr

from sympow_jax.input_pipeline import ConcatView, StoreError, open_store
from sympow_jax.input_pipeline.prepare.verify import verify
from sympow_jax.input_pipeline.views import BinStore
from tests.input_pipeline.stores import random_tokens, write_store

SHAPE, CHUNKS = (21, 70), (8, 32)  # ragged in both dimensions
LONGCRAWL64 = {
    "chunks": [2048, 2048],
    "compressor": {"blocksize": 0, "clevel": 5, "cname": "lz4", "id": "blosc", "shuffle": 1},
    "dtype": "<u2",
    "fill_value": 0,
    "filters": None,
    "order": "C",
    "zarr_format": 2,
}


@pytest.fixture
def tokens(rng):
    return random_tokens(rng, SHAPE)


@pytest.mark.parametrize("compressor", ["blosc", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_written_stores_read_back_and_zarr_agrees(tmp_path, tokens, compressor, dtype):
    tokens = tokens.astype(dtype) + np.array(70_000 if dtype == "<u4" else 0, dtype)
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS, compressor=compressor, vocab_size=80_000)
    store = open_store(str(path))
    assert (store.num_documents, store.document_length) == SHAPE
    for rows, columns in [(slice(0, 21), slice(0, 70)), (slice(5, 18), slice(31, 33)), (slice(20, 21), slice(69, 70))]:
        np.testing.assert_array_equal(store.read(rows, columns), tokens[rows, columns])
    assert store.read(slice(0, 1), slice(0, 1)).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(zarr.open_array(path, mode="r", zarr_format=2)[:], tokens)
    assert verify(str(path)) == []


@pytest.mark.parametrize("separator", [".", "/"])
def test_stores_written_by_zarr_python_are_read(tmp_path, tokens, separator):
    array = zarr.create_array(
        tmp_path / "z.zarr", shape=SHAPE, chunks=CHUNKS, dtype="<u2", zarr_format=2, fill_value=0,
        chunk_key_encoding={"name": "v2", "separator": separator},
    )  # fmt: skip
    array[:] = tokens
    store = open_store(str(tmp_path / "z.zarr"))
    np.testing.assert_array_equal(store.read(slice(0, 21), slice(0, 70)), tokens)
    assert (store.vocab_size, store.bos_id) == (50257, 50256)  # LongCrawl64's, where the attributes say nothing
    assert store.digest.startswith("listing:")


def test_metadata_are_those_of_longcrawl64(tmp_path, rng):
    path = write_store(tmp_path / "a.zarr", random_tokens(rng, (3, 4096)), chunks=(2048, 2048))
    assert json.loads((path / ".zarray").read_text()) == {**LONGCRAWL64, "shape": [3, 4096]}


def test_digest_follows_the_content(tmp_path, tokens):
    first = open_store(str(write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)))
    same = open_store(str(write_store(tmp_path / "b.zarr", tokens, chunks=CHUNKS)))
    tokens[3, 3] ^= 1
    other = open_store(str(write_store(tmp_path / "c.zarr", tokens, chunks=CHUNKS)))
    assert first.digest == same.digest != other.digest


def test_missing_chunks_are_refused_by_name(tmp_path, tokens):
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)
    (path / "1.2").unlink()
    with pytest.raises(StoreError, match=r"1 of 9 chunks are missing \(1\.2\); fetch them"):
        open_store(str(path))
    with pytest.raises(ValueError, match=r"data.missing_chunks = 'ignore': legal are refuse, exclude"):
        open_store(str(path), missing_chunks="ignore")


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_rows_of_missing_chunks_are_left_out_and_counted(tmp_path, tokens, gone, caplog):
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)
    (path / f"{gone}.0").unlink()
    with caplog.at_level(logging.WARNING):
        store = open_store(str(path), missing_chunks="exclude")
    kept = np.delete(np.arange(21), np.arange(gone * 8, min(gone * 8 + 8, 21)))
    assert f"{21 - len(kept)} of 21 documents are left out" in caplog.text
    assert store.num_documents == len(kept)
    np.testing.assert_array_equal(store.read(slice(0, len(kept)), slice(3, 40)), tokens[kept, 3:40])
    np.testing.assert_array_equal(store.clusters, kept)
    whole = open_store(str(write_store(tmp_path / "b.zarr", tokens, chunks=CHUNKS)))
    assert store.digest.startswith(f"{whole.digest}/rows:")


def test_a_store_without_any_complete_row_is_refused(tmp_path, tokens):
    path = write_store(tmp_path / "a.zarr", tokens[:8], chunks=CHUNKS)
    (path / "0.1").unlink()
    with pytest.raises(StoreError, match="no complete row of chunks"):
        open_store(str(path), missing_chunks="exclude")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "emptied":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["removed", "truncated", "emptied", "flipped"])
@pytest.mark.parametrize("compressor", ["blosc", "zstd", "none"])
def test_damage_is_named_at_first_use(tmp_path, tokens, how, compressor):
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS, compressor=compressor)
    store = open_store(str(path))
    damage(path / "1.1", how)
    store.read(slice(0, 8), slice(0, 70))
    with pytest.raises(StoreError, match=r"chunk 1\.1 is (missing|damaged)") as caught:
        store.read(slice(0, 21), slice(0, 70))
    assert "\n" not in str(caught.value)
    assert any("chunk 1.1" in fault for fault in verify(str(path)))


@pytest.mark.parametrize("how", ["removed", "truncated", "emptied"])
def test_damage_is_named_without_digests_too(tmp_path, tokens, how):
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS, manifest=False)
    store = open_store(str(path))
    damage(path / "2.0", how)
    with pytest.raises(StoreError, match=r"chunk 2\.0 (is missing|cannot be decoded)") as caught:
        store.read(slice(0, 21), slice(0, 70))
    assert "\n" not in str(caught.value)


def test_tokens_over_the_vocabulary_are_named(tmp_path, tokens):
    tokens[17, 40] = 257  # the first that is not below vocab_size
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)
    store = open_store(str(path))
    with pytest.raises(StoreError, match=r"chunk 2\.1 holds token 257 at \[17, 40\], but vocab_size = 257"):
        store.read(slice(10, 20), slice(0, 70))
    assert len(verify(str(path))) == 1


def test_verify_compares_the_shape_with_the_manifest(tmp_path, tokens):
    path = write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)
    zarray = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**zarray, "shape": [16, 70]}))
    assert len(verify(str(path))) == 1
    assert "manifest lists 9 chunks, .zarray with shape [16, 70] and chunks [8, 32] needs 6" in verify(str(path))[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no zarr v2 array there"),
        ("{", r"\.zarray: is no JSON"),
        ('{"dtype": "<f4", "shape": [1, 1], "chunks": [1, 1]}', "legal are <u2"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / ".zarray").write_text(content)
    with pytest.raises(StoreError, match=message):
        open_store(str(tmp_path))
    assert len(verify(str(tmp_path))) == 1


def test_rectangles_outside_are_refused(tmp_path, tokens):
    store = open_store(str(write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)))
    for rows, columns in [(slice(0, 22), slice(0, 1)), (slice(0, 1), slice(60, 71)), (slice(3, 3), slice(0, 1))]:
        with pytest.raises(IndexError, match=r"has 21 rows|has 70 columns"):
            store.read(rows, columns)


def bytes_read() -> int:
    return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]


@pytest.mark.parametrize(("cache_bytes", "reads"), [(5 * 2**15, 3), (2**24, 1)])
def test_cache_keeps_its_bound(tmp_path, rng, cache_bytes, reads):
    tokens = random_tokens(rng, (64, 4096))
    path = write_store(tmp_path / "a.zarr", tokens, chunks=(64, 256), manifest=False)  # 16 chunks of 32 KiB
    size = sum(file.stat().st_size for file in path.glob("0.*"))
    store = open_store(str(path), cache_bytes=cache_bytes)
    before = bytes_read()
    for _ in range(3):
        for column in range(0, 4096, 256):
            store.read(slice(0, 64), slice(column, column + 256))
    assert bytes_read() - before == reads * size


def test_ConcatView_joins_rows_of_one_document(tmp_path, rng):
    tokens = random_tokens(rng, (6, 10))
    clusters = [7, 3, 7, 3, 9, 7]
    store = open_store(str(write_store(tmp_path / "a.zarr", tokens, chunks=(4, 4), clusters=clusters)))
    stream = tokens[[1, 3, 0, 2, 5, 4]].reshape(-1)
    view = ConcatView(store, 25)
    assert (view.num_documents, view.document_length) == (2, 25)
    assert view.clusters.tolist() == [3, 7] and ConcatView(store, 12).clusters.tolist() == [3, 3, 7, 7, 9]
    np.testing.assert_array_equal(view.read(slice(0, 2), slice(0, 25)), stream[:50].reshape(2, 25))
    np.testing.assert_array_equal(view.read(slice(1, 2), slice(4, 21))[0], stream[29:46])
    with pytest.raises(ValueError, match="concat length = 61"):
        ConcatView(store, 61)


def test_nanogpt_bin(tmp_path, rng):
    tokens = random_tokens(rng, (2 * 65536 + 5,), vocab=50257)
    path = tmp_path / "train.bin"
    tokens.tofile(path)
    store = BinStore(str(path))
    assert (store.num_documents, store.document_length) == (2, 65536)
    np.testing.assert_array_equal(store.read(slice(1, 2), slice(5, 9))[0], tokens[65541:65545])
    tokens[70000] = 60000
    tokens.tofile(path)
    with pytest.raises(StoreError, match="token 60000 at 70000"):
        BinStore(str(path)).read(slice(0, 2), slice(0, 65536))
    path.write_bytes(b"abc")
    with pytest.raises(StoreError, match="3 bytes are no whole number of uint16"):
        BinStore(str(path))


def test_cache_too_small_for_one_rectangle(tmp_path, tokens):
    store = open_store(str(write_store(tmp_path / "a.zarr", tokens, chunks=CHUNKS)), cache_bytes=1000)
    store.check_cache(8, 32)
    with pytest.raises(ValueError, match=r"data.cache_bytes = 1000: 8 x 70 .* 3 chunks .*; use at least 1536"):
        store.check_cache(8, 70)
    with pytest.raises(ValueError, match=r"9 x 32 tokens lie in 2 chunks"):  # the ninth row is in the next ones
        store.check_cache(9, 32)
