"""The bytes of a file that may be compressed (gzip, bzip2, xz, zstd, lz4), told by its content and read to its end.

A member that is cut off, fails its checksum or is followed by anything else than another member is an error: nothing
of a damaged file passes for the whole.
"""

import lzma
import pathlib
from collections.abc import Iterator
from typing import IO

BLOCK = 2**20  # bytes read at a time
_XZ_BLOCK = 2**14  # xz packs up to 7,000 times: no more than this is unpacked at once
_MAGICS = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # what follows `BZh` and a digit: a block, or the end of an empty stream
_SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}


class DamagedError(ValueError):
    """A file that is not what its name or its first bytes say; the message is the reason."""


def codec_of(head: bytes) -> str | None:
    """The compression that the first bytes of a file show."""
    for magic, codec in _MAGICS.items():
        if head.startswith(magic) and (codec != "bz2" or head[4:10] in _BZ2_BLOCKS):
            return codec
    skippable = len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"*M\x18"  # as pzstd begins its files
    return "zstd" if skippable else None


def unpacked_name(name: str) -> str:
    """`name` in lower case without the suffix of a compression."""
    lower = name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if lower.endswith(suffix)), "")
    return lower.removesuffix(suffix)


def open_blocks(path: pathlib.Path) -> Iterator[bytes]:
    """The unpacked content, block by block. Raises DamagedError, or OSError where the system cannot read."""
    with path.open("rb") as file:
        codec = codec_of(file.read(16))
        claimed = _SUFFIXES.get(path.suffix.lower())
        if claimed and claimed != codec:
            raise DamagedError(f"named {path.suffix}, but holds no {claimed} data")
        file.seek(0)
        if codec is None:
            yield from _blocks(file, BLOCK)
        elif codec == "xz":
            yield from _xz_blocks(_blocks(file, _XZ_BLOCK))
        else:
            yield from _arrow_blocks(file, codec)


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while block := file.read(size):
        yield block


def _arrow_blocks(file: IO[bytes], codec: str) -> Iterator[bytes]:
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(file, codec) as stream:
            while block := stream.read(BLOCK):
                yield block
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"damaged {codec} data: {error}") from None


def _xz_blocks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        for block in blocks:
            while block:
                if decompressor.eof:
                    block = block.lstrip(b"\0")  # padding between streams
                    if not block:
                        break
                    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
                if unpacked := decompressor.decompress(block):  # an empty block is the end to those who read them
                    yield unpacked
                block = decompressor.unused_data
    except lzma.LZMAError as error:
        raise DamagedError(f"damaged xz data: {error}") from None
    if not decompressor.eof:
        raise DamagedError("damaged xz data: cut off")
