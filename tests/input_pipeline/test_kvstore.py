import contextlib
import functools
import http.server
import json
import pathlib
import threading
import urllib.parse

import numpy as np
import pytest

from sympow_jax.input_pipeline import StoreError, open_store
from sympow_jax.input_pipeline.kvstore import kvstore_spec
from tests.input_pipeline.stores import random_tokens, write_store


@pytest.mark.parametrize(
    ("address", "spec"),
    [
        ("gs://longcrawl64/train.zarr", {"driver": "gcs", "bucket": "longcrawl64", "path": "train.zarr/"}),
        ("s3://bucket/a/b.zarr/", {"driver": "s3", "bucket": "bucket", "path": "a/b.zarr/"}),
        ("https://host:81/a.zarr", {"driver": "http", "base_url": "https://host:81", "path": "/a.zarr/"}),
    ],
)
def test_specs(address, spec):
    assert kvstore_spec(address) == spec


def test_local_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kvstore_spec("a.zarr") == {"driver": "file", "path": f"{tmp_path}/a.zarr/"}


@pytest.mark.parametrize("address", ["ftp://host/a", "gs://", "hf://x/y"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ValueError, match=r"use a local path or an address that starts with gs://, s3://"):
        kvstore_spec(address)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, over http."""

    def log_message(self, *args):
        pass


class Bucket(Quiet):
    """The part of Google Cloud Storage's JSON interface that reading needs: media of an object, and a listing."""

    def do_GET(self):
        parts = urllib.parse.urlsplit(self.path)
        place = parts.path.removeprefix("/storage/v1/b/bucket/o")
        path = pathlib.Path(self.directory, urllib.parse.unquote(place).removeprefix("/"))
        if parts.path.startswith("/storage/") and not place:
            first, last = (urllib.parse.parse_qs(parts.query)[name][0] for name in ("startOffset", "endOffset"))
            names = (file.relative_to(self.directory).as_posix() for file in path.rglob("*") if file.is_file())
            content = json.dumps({"items": [{"name": name} for name in names if first <= name < last]}).encode()
        else:  # also what asks for the credentials of a cloud machine, of which there are none
            content = path.read_bytes() if place and path.is_file() else None
        self.send_response(404 if content is None else 200)
        self.send_header("x-goog-generation", "1")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")


@contextlib.contextmanager
def serve(folder, kind=Quiet):
    handler = functools.partial(kind, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_store_over_http(tmp_path, rng):
    tokens = random_tokens(rng, (10, 40))
    path = write_store(tmp_path / "a.zarr", tokens, chunks=(4, 16))
    with serve(tmp_path) as url:
        store = open_store(f"{url}/a.zarr")
        np.testing.assert_array_equal(store.read(slice(0, 10), slice(0, 40)), tokens)
        assert store.digest == open_store(str(path)).digest
        (path / "1.0").unlink()
        with pytest.raises(StoreError, match=r"1 of 9 chunks are missing \(1\.0\)"):
            open_store(f"{url}/a.zarr")
        part = open_store(f"{url}/a.zarr", missing_chunks="exclude")
        np.testing.assert_array_equal(part.read(slice(0, 6), slice(0, 40)), np.delete(tokens, range(4, 8), axis=0))
        with pytest.raises(StoreError, match="no zarr v2 array there"):
            open_store(f"{url}/nothing.zarr")


def test_a_store_in_a_bucket(tmp_path, rng, monkeypatch):
    tokens = random_tokens(rng, (10, 40))
    path = write_store(tmp_path / "a.zarr", tokens, chunks=(4, 16))
    (path / "1.0").unlink()
    with serve(tmp_path, Bucket) as url:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        monkeypatch.setenv("GCE_METADATA_ROOT", url.removeprefix("http://"))
        with pytest.raises(StoreError, match=r"1 of 9 chunks are missing \(1\.0\)"):
            open_store("gs://bucket/a.zarr")
        store = open_store("gs://bucket/a.zarr", missing_chunks="exclude")
        np.testing.assert_array_equal(store.read(slice(0, 6), slice(0, 40)), np.delete(tokens, range(4, 8), axis=0))
        assert store.tokenizer.vocab_size == 257


class Ranges(Quiet):
    """A server that gives parts, as buckets do."""

    def do_GET(self):
        path = pathlib.Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            return super().do_GET()
        content, (first, last) = path.read_bytes(), self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.mark.parametrize("kind", [Quiet, Ranges])
def test_a_chunk_over_http_that_claims_to_unpack_to_gigabytes_is_refused(tmp_path, rng, kind):
    tokens = random_tokens(rng, (4, 32))
    path = write_store(tmp_path / "a.zarr", tokens, chunks=(4, 16))
    content = (path / "0.1").read_bytes()
    (path / "0.1").write_bytes(content[:4] + (2**32 - 17).to_bytes(4, "little") + content[8:])
    with serve(tmp_path, kind) as url:
        store = open_store(f"{url}/a.zarr")
        np.testing.assert_array_equal(store.read(slice(0, 4), slice(0, 16)), tokens[:, :16])
        with pytest.raises(StoreError, match=r"chunk 0\.1 cannot be decoded \(it has 4,294,967,279 bytes"):
            store.read(slice(0, 1), slice(16, 17))
