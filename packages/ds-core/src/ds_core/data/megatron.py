"""Reads token files of Megatron-LM and DeepSpeed: a `.bin` of elements and an `.idx` beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ds_core.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
#: Element types by code. Programs disagree from 6 on; the size of the file tells which it is.
_DTYPES = {
    1: ("uint8",),
    2: ("int8",),
    3: ("int16",),
    4: ("int32",),
    5: ("int64",),
    6: ("uint16",),
    7: ("uint32",),
    8: ("uint64", "uint16"),
}


class MegatronTokens:
    """The sequences of a `.bin`/`.idx` pair, mapped: nothing is read until it is used.

    Args:
        prefix: the path of both files without their endings.

    Attributes:
        lengths: elements per sequence, `[num_sequences]`.
        elements: those of all sequences, one after the other, `[n]`.

    Raises DataError if a file is missing, of another format, or has not its size.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        index_path, data_path = Path(f"{os.fspath(prefix)}.idx"), Path(f"{os.fspath(prefix)}.bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise DataError(f"{str(path)!r} does not exist; give the path without its ending")
        header = np.fromfile(index_path, np.uint8, _HEADER_BYTES).tobytes()
        if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
            raise DataError(f"{str(index_path)!r} is not an index of Megatron's format")
        version = int.from_bytes(header[9:17], "little")
        code, num_sequences = header[17], int.from_bytes(header[18:26], "little")
        if version != 1 or code not in _DTYPES:
            raise DataError(
                f"{str(index_path)!r} has version {version} and element type {code}; version 1 "
                f"and types {min(_DTYPES)} to {max(_DTYPES)} are known"
            )
        if index_path.stat().st_size < _HEADER_BYTES + 12 * num_sequences:
            raise DataError(f"{str(index_path)!r} is cut off: it states {num_sequences} sequences")
        self.lengths = np.zeros(0, np.int32)
        if num_sequences:
            self.lengths = np.memmap(
                index_path, np.dtype("<i4"), "r", _HEADER_BYTES, (num_sequences,)
            )
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        total = int(self._ends[-1]) if num_sequences else 0
        size = data_path.stat().st_size
        fitting = [name for name in _DTYPES[code] if np.dtype(name).itemsize * total == size]
        if not fitting:
            raise DataError(
                f"{str(data_path)!r} has {size} bytes, and its index states {total} elements of "
                f"{' or '.join(_DTYPES[code])}"
            )
        dtype = np.dtype(fitting[0]).newbyteorder("<")
        self.elements = np.zeros(0, dtype)
        if total:
            self.elements = np.memmap(data_path, dtype, "r", shape=(total,))

    def __len__(self) -> int:
        """Sequences."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One sequence, `[length]`, int64."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        end = int(self._ends[index])
        found = self.elements[end - int(self.lengths[index]) : end]
        return torch.from_numpy(found.astype(np.int64))
