"""Where a store lives: a local folder or a gs://, s3://, http(s):// address, as a tensorstore key-value store."""

import concurrent.futures
import functools
import os
import pathlib
import stat
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import tensorstore as ts

from sympow_jax.files import FileError, check_folder_name

SCHEMES = ("gs://", "s3://", "http://", "https://")
_REQUESTS_AT_ONCE = 32


def is_remote(address: str) -> bool:
    """True for an address with a scheme, False for a local path."""
    return "://" in address


def kvstore_spec(address: str) -> dict[str, Any]:
    """The tensorstore specification of the folder at `address` (a local path or one of SCHEMES)."""
    if not is_remote(address):
        check_folder_name(address, "store")
        return {"driver": "file", "path": f"{pathlib.Path(address).resolve()}/"}
    parts = urllib.parse.urlsplit(address)
    folder = parts.path.strip("/") + "/"
    if not address.startswith(SCHEMES) or not parts.netloc:
        raise ValueError(f"store = {address!r}: use a local path or an address that starts with {', '.join(SCHEMES)}")
    if parts.scheme in ("gs", "s3"):
        driver = "gcs" if parts.scheme == "gs" else "s3"
        return {"driver": driver, "bucket": parts.netloc, "path": folder}
    return {"driver": "http", "base_url": f"{parts.scheme}://{parts.netloc}", "path": "/" + folder}


@functools.lru_cache(maxsize=8)
def shared_context(cache_bytes: int) -> ts.Context:
    """A least-recently-used cache of at most `cache_bytes` of decoded chunks, shared by the stores opened with it."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def open_kvstore(address: str) -> ts.KvStore:
    """The key-value store at `address`; nothing is read yet."""
    return ts.KvStore.open(kvstore_spec(address)).result()


def read_key(kvstore: ts.KvStore, key: str, *, max_bytes: int, head: int | None = None) -> bytes | None:
    """Content of `key`, None when it is absent; where `head` is given at least its first `head` bytes, if it has them.

    Raises:
      FileError: more than `max_bytes`, or a local file that is none; links are followed, as caches of downloads are
        folders of links.
    """
    if kvstore.spec().to_json()["driver"] == "file":
        return _read_local(pathlib.Path(kvstore.path) / key, max_bytes, head)
    try:
        result = kvstore.read(key, byte_range=None if head is None else slice(0, head)).result()
    except ValueError:  # shorter than that, or on a server that gives no parts
        result = kvstore.read(key).result()
    content = result.value if result.state == "value" else None
    if content is not None and len(content) > max_bytes:
        raise FileError(f"{key}: has {len(content):,} bytes; at most {max_bytes:,} are read")
    return content


def _read_local(path: pathlib.Path, max_bytes: int, head: int | None) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path.name}: is no regular file")
        if status.st_size > max_bytes:
            raise FileError(f"{path.name}: has {status.st_size:,} bytes; at most {max_bytes:,} are read")
        return file.read(head)


def present_keys(address: str, kvstore: ts.KvStore, candidates: list[str]) -> set[str]:
    """Those of `candidates` that exist: by listing, or by a HEAD request for each where http has no listing."""
    if not address.startswith(("http://", "https://")):
        return {key.decode() for key in kvstore.list().result()} & set(candidates)
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        exists = pool.map(lambda key: _url_exists(f"{address.rstrip('/')}/{key}"), candidates)
        return {key for key, present in zip(candidates, exists, strict=True) if present}


def _url_exists(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60):
            return True
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                return False
        raise
