"""Where a store lives: a local folder or a gs://, s3://, http(s):// address, as a tensorstore key-value store."""

import concurrent.futures
import functools
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import tensorstore as ts

SCHEMES = ("gs://", "s3://", "http://", "https://")
_REQUESTS_AT_ONCE = 32


def is_remote(address: str) -> bool:
    """True for an address with a scheme, False for a local path."""
    return "://" in address


def kvstore_spec(address: str) -> dict[str, Any]:
    """The tensorstore specification of the folder at `address` (a local path or one of SCHEMES)."""
    if not is_remote(address):
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


def read_key(kvstore: ts.KvStore, key: str) -> bytes | None:
    """Content of `key`, None when it is absent."""
    result = kvstore.read(key).result()
    return result.value if result.state == "value" else None


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
