"""What a file holds: text and its encoding, JSON, a table, or something that is no text and is refused by name."""

import codecs
import pathlib
from collections.abc import Iterator

from sympow_jax.input_pipeline.prepare.decompress import DamagedError, codec_of, unpacked_name

HEAD = 8192  # bytes that decide; the first of them is also where git looks for the null byte of a binary file
_TABLES = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow_file", b"\xff\xff\xff\xff": "arrow_stream"}
_TABLE_SUFFIXES = {".parquet": ("parquet",), ".arrow": ("arrow_file", "arrow_stream")}
_JSON_SUFFIXES = {".jsonl": "json_lines", ".ndjson": "json_lines", ".jsonlines": "json_lines", ".json": "json"}
_SEPARATED = (".csv", ".tsv")
# (offset, bytes, what it is); before an offset above 0 there must be a null byte, which text has not
_FOREIGN = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF87a", "a GIF image"),
    (0, b"GIF89a", "a GIF image"),
    (4, b"ftyp", "an MP4 file"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document"),
    (0, b"PK\x03\x04", "a zip archive (.zip, .docx, .epub, .pt, .npz)"),
    (257, b"ustar", "a tar archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"WARC/", "a WARC crawl archive"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (8, b'{"', "a safetensors file"),
    *((0, bytes([0x80, protocol]), "a Python pickle") for protocol in range(2, 6)),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"\x7fELF", "an ELF program"),
)
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


class ForeignError(ValueError):
    """A file that holds no text; the message says what it holds, `place` where that shows, if it needs saying."""

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.place = place


def recognise(path: pathlib.Path, head: bytes) -> str:
    """ "text", "json_lines", "json", "parquet", "arrow_file" or "arrow_stream", from the name and first HEAD bytes.

    `head` is of the unpacked content. Raises ForeignError for what is no text, DamagedError for what is not what its
    name says.
    """
    suffix = pathlib.PurePath(unpacked_name(path.name)).suffix
    if head.startswith(b"version https://git-lfs"):
        raise DamagedError("is a Git LFS pointer, its content was never fetched: git lfs pull")
    if codec := codec_of(head):
        raise DamagedError(f"is compressed twice, the second time with {codec}: unpack it once")
    table = next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)
    if suffix in _TABLE_SUFFIXES and table not in _TABLE_SUFFIXES[suffix]:
        raise DamagedError(f"named {suffix}, but holds no such table")
    if table and (suffix in _TABLE_SUFFIXES or b"\0" in head):
        return table
    if suffix in _SEPARATED:
        raise ForeignError(f"a {suffix} table (make a .jsonl or .parquet of it)")
    for offset, magic, what in _FOREIGN:
        if head.startswith(magic, offset) and (not offset or b"\0" in head[:offset]):
            raise ForeignError(what)
    if encoding_of(head)[1] == 0 and (null := head.find(b"\0")) >= 0:
        raise ForeignError("binary data, or UTF-16 without a byte order mark", f" (a null byte at offset {null})")
    return _JSON_SUFFIXES.get(suffix, "text")


def encoding_of(head: bytes) -> tuple[str, int]:
    """The Unicode encoding that a byte order mark names, and the mark's length; UTF-8 without one."""
    return next(((encoding, len(bom)) for bom, encoding in _BOMS if head.startswith(bom)), ("utf-8", 0))


def decode(blocks: Iterator[bytes], head: bytes) -> Iterator[str]:
    """The text of `blocks`, which begin with `head`, without a byte order mark.

    Raises DamagedError with the offset of the first byte that is not in the encoding, and of a null character.
    """
    encoding, skip = encoding_of(head)
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    read = 0
    for block in _ended(blocks):
        final = not block
        if not read:
            block, read = block[skip:], skip
        start = read - len(decoder.getstate()[0])  # of the first byte that is not decoded yet
        read += len(block)
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            raise DamagedError(
                f"byte 0x{error.object[error.start]:02x} at offset {start + error.start} is no {encoding.upper()} "
                f"({error.reason}); convert the file, from Latin-1 with iconv -f LATIN1 -t UTF-8"
            ) from None
        if (null := text.find("\0")) >= 0:
            raise DamagedError(f"null byte at offset {start + len(text[:null].encode(encoding))}, so no plain text")
        yield text


def _ended(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks, then an empty one."""
    yield from blocks
    yield b""
