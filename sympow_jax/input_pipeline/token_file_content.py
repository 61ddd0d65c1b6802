"""What speaks against a file being raw uint16 tokens: another format, text, or numbers of another width or order."""

from collections.abc import Iterator

import numpy as np

HEAD = 4096  # bytes of the beginning that decide
_SAMPLE = 2**15  # tokens, at three places
_MAGICS = {
    b"\x1f\x8b\x08": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ\0": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip archive (.npz, .pt); unpack it first",
    b"PAR1": "a Parquet table; give it to `prepare.py text`",
    b"ARROW1": "an Arrow table; give it to `prepare.py text`",
    b"\x89HDF": "an HDF5 file",
    b"MMIDIDX\0": "a Megatron index; name the .bin",
    b"TNTIDX\0": "an old index of fairseq or Megatron; write the data again with preprocess_data.py",
    b"version https://git-lfs": "a Git LFS pointer, its content was never fetched: git lfs pull",
    (20240520).to_bytes(4, "big"): "a shard of llm.c in big-endian order; write it again in little-endian order",
    (20240801).to_bytes(4, "big"): "a shard of llm.c in big-endian order; write it again in little-endian order",
    (20240522).to_bytes(4, "little"): "an evaluation file of llm.c, which holds questions, not a text",
}
# Bytes of eight that a type leaves at (nearly) 0, and some that it does not, by what the file then is
_LAYOUTS = {
    "int64": ([2, 3, 4, 5, 6, 7], [0, 1]),
    "big-endian int64 (>i8)": ([0, 1, 2, 3, 4, 5], [6, 7]),
    "int32": ([2, 3, 6, 7], [0, 1, 4, 5]),
    "big-endian int32 (>i4)": ([0, 1, 4, 5], [2, 3, 6, 7]),
    "big-endian uint16 (>u2)": ([0, 2, 4, 6], [1, 3, 5, 7]),
}


def samples(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(place, values) at the beginning, in the middle and at the end, each place a multiple of 8."""
    last = max(0, len(values) - _SAMPLE) // 8 * 8
    for place in sorted({0, last // 16 * 8, last}):
        yield place, np.asarray(values[place : place + _SAMPLE])


def foreign(path: str, size: int, head: bytes) -> str:
    """What else the file plainly is, and what to do with it; empty where it may be raw uint16."""
    for magic, what in _MAGICS.items():
        if head.startswith(magic):
            return f"is {what}"
    if _is_text(head):
        return "holds text; give it to `prepare.py text`"
    content = np.memmap(path, np.uint8, mode="r")
    rows = [part[: len(part) // 8 * 8].reshape(-1, 8) for _, part in samples(content)]
    number = sum(len(part) for part in rows)
    if not number:
        return ""
    largest = np.max([part.max(axis=0, initial=0) for part in rows], axis=0)
    for name, (quiet, loud) in _LAYOUTS.items():
        rest = int(largest[quiet].max())
        if (rest == 0 and largest[loud].max() > 0) or (number >= 32 and rest < 16 <= int(largest[loud].min())):
            return f"looks like {name}, not uint16: bytes {quiet} of every 8 are {'0' if rest == 0 else 'below 16'}"
    return ""


def _is_text(head: bytes) -> bool:
    """Whether at least 32 bytes are UTF-8 without control characters; a character cut at the end does not count."""
    if len(head) < 32:
        return False
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\n\r\f" for character in text)
