"""Megatron's index `.idx`: the number type of the `.bin` beside it, and where its documents end.

After the magic: version (uint64), number type (uint8), the counts of sequences and of document boundaries (uint64
each); then the length (int32) and the byte offset (int64) of each sequence, and for each boundary the sequence at which
it lies (int64), the first 0 (Shoeybi et al., Megatron-LM, 2019; the format is that of its `IndexedDataset`).
"""

import pathlib
import struct

import numpy as np

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def read_index(path: pathlib.Path) -> tuple[np.dtype, np.ndarray]:
    """The number type, and [documents + 1] where each document starts and the end, in tokens.

    Raises ValueError for what is no such index, cut, or describes sequences that do not lie end to end.
    """
    content = path.read_bytes()
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise ValueError(
            f"{path.name} beside it is no Megatron index (magic MMIDIDX); move it away if the two do not belong "
            "together, else write them again with Megatron's preprocess_data.py"
        )
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        legal = ", ".join(f"{code} ({np.dtype(name).name})" for code, name in _DTYPES.items())
        raise ValueError(f"{path.name} has version {version} and number type {code}; legal are version 1 and {legal}")
    if _HEADER.size + num_sequences * 12 + num_boundaries * 8 > len(content):
        raise ValueError(
            f"{path.name} is cut: {len(content):,} bytes for {num_sequences:,} sequences and {num_boundaries:,} "
            "boundaries; fetch it again"
        )
    number = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, _HEADER.size + num_sequences * 4)
    boundaries = np.frombuffer(content, "<i8", num_boundaries, _HEADER.size + num_sequences * 12)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * number.itemsize):
        raise ValueError(f"{path.name}: its sequences do not lie end to end; write it again with preprocess_data.py")
    rises = num_boundaries > 0 and boundaries[0] == 0 and (np.diff(boundaries) >= 0).all()
    if not rises or boundaries[-1] != num_sequences:
        raise ValueError(
            f"{path.name}: its documents do not rise from sequence 0 to {num_sequences:,}; write it again with "
            "preprocess_data.py"
        )
    return number, ends[boundaries]
