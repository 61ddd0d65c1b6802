"""How many bytes a compressed chunk can decode to, found without decoding it into memory.

A few kilobytes of zeros unpack to gigabytes, and decoders allocate what a header claims. Formats: RFC 8878 (zstd), RFC
1950 and 1952 (zlib, gzip), bzip2, and the 16-byte header of blosc 1.
"""

import bz2
import zlib
from typing import Any

COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "bz2")
BLOSC_HEADER = 16
_PIECE = 2**16
_ZSTD_BLOCK = 128 * 2**10  # no block of a frame holds more
_ZSTD_SLACK = 4, 32 * 2**20  # an encoder may end its blocks early, so that their number is only a bound


def check_decoded_size(content: bytes, compressor: str | None, size: int) -> None:
    """Raises ValueError when a chunk of `size` bytes cannot be what `content` decodes to, or it is damaged.

    Args:
      content: the file of the chunk; of blosc's, BLOSC_HEADER bytes are enough.
      compressor: its id in .zarray, or None.
      size: bytes of the decoded chunk.
    """
    if compressor is None:  # the file is the chunk; the reader compares its length
        return
    if compressor == "blosc":
        if len(content) < BLOSC_HEADER:
            raise ValueError("it is shorter than a blosc header")
        decoded = int.from_bytes(content[4:8], "little")
    elif compressor == "zstd":
        factor, slack = _ZSTD_SLACK
        decoded = min(_zstd_bound(content), 2**63)
        if size < decoded <= factor * size + slack:
            return
    else:
        decoded = _streamed_size(content, compressor, size)
    if decoded > size:
        raise ValueError(f"it decodes to {decoded:,} bytes or more, and a chunk has {size:,}")


def _streamed_size(content: bytes, compressor: str, size: int) -> int:
    """The decoded size, or a number above `size` as soon as it is known to be."""
    total = 0
    while content:
        decoder: Any = bz2.BZ2Decompressor() if compressor == "bz2" else zlib.decompressobj(zlib.MAX_WBITS | 32)
        while not decoder.eof:
            try:
                piece = decoder.decompress(content, _PIECE)
            except (OSError, zlib.error) as error:
                raise ValueError(str(error)) from None
            content = b"" if compressor == "bz2" else decoder.unconsumed_tail
            total += len(piece)
            if total > size:
                return total
            if not piece and not content and not decoder.eof:
                raise ValueError("it ends too early")
        content = decoder.unused_data
    return total


def _zstd_bound(content: bytes) -> int:
    """At least the decoded size of all frames: blocks are counted, their contents left packed."""
    total, place = 0, 0
    while place < len(content):
        magic = int.from_bytes(content[place : place + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            place += 8 + int.from_bytes(content[place + 4 : place + 8], "little")
            continue
        if magic != 0xFD2FB528 or len(content) < place + 6:
            raise ValueError("it is no zstd frame")
        flags = content[place + 4]
        single, checksum = flags >> 5 & 1, flags >> 2 & 1
        content_size = (single, 2, 4, 8)[flags >> 6]
        place += 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + content_size
        last = 0
        while not last:
            if len(content) < place + 3:
                raise ValueError("it ends too early")
            header = int.from_bytes(content[place : place + 3], "little")
            last, kind, length = header & 1, header >> 1 & 3, header >> 3
            total += length if kind < 2 else _ZSTD_BLOCK
            place += 3 + (1 if kind == 1 else length)
        place += 4 * checksum
    return total
