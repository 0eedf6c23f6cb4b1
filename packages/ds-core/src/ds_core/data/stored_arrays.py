"""Folders of arrays on disk: written whole or not at all, mapped into memory, checkable.

A folder holds one raw file per array (`NAME.bin`: the elements in C order, little-endian) and
`index.json`, written last, with each array's dtype, shape, bytes and CRC-32, the format's name and
version, and what the owner adds. Any program reads it with a JSON parser and a memory map.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ds_core.errors import DataError

_INDEX = "index.json"
_CHUNK_BYTES = 1 << 24


class ArrayWriter:
    """Writes one array of rows as they come, into a folder under construction.

    Args:
        file: open for writing, unbuffered.
        dtype: of the elements.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self.dtype = file, dtype.newbyteorder("<")
        self.count = self._checksum = 0

    def write(self, values: np.ndarray) -> None:
        """Append the elements of an array, which must fit the dtype."""
        from ds_core.checkpoint.files import write_all

        flat = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1)
        data = flat.tobytes()
        write_all(self._file, data)
        self._checksum = zlib.crc32(data, self._checksum)
        self.count += len(flat)

    def record(self) -> dict[str, Any]:
        """What the folder's index says of it."""
        return {
            "dtype": self.dtype.name,
            "count": self.count,
            "bytes": self.count * self.dtype.itemsize,
            "crc32": self._checksum,
        }


class ArrayFolder:
    """A folder under construction beside its final place; `publish` makes it appear, whole.

    Args:
        path: where it will be.
        kind: name of the format, which a reader checks.
        replaces: whether a folder that is there is replaced; else it is an error.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, *, replaces: bool = False) -> None:
        self.path, self.kind, self._replaces = Path(path), kind, replaces
        if self.path.exists() and not replaces:
            raise DataError(f"{str(self.path)!r} exists already; remove it, or pass overwrite=True")
        # Always the same name: what a crash leaves is cleared away the next time.
        self._under_way = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(self._under_way, ignore_errors=True)
        self._under_way.mkdir(parents=True)
        self._records: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterator[np.ndarray], dtype: np.dtype[Any]) -> int:
        """Write one array from pieces; returns the number of its elements."""
        # Here, because reading a config imports this module, and that should not cost torch's DCP.
        from ds_core.checkpoint.files import create_synced

        with create_synced(self._under_way / f"{name}.bin") as file:
            writer = ArrayWriter(file, dtype)
            for chunk in chunks:
                writer.write(chunk)
        self._records[name] = writer.record()
        return writer.count

    def write_array(self, name: str, values: np.ndarray) -> None:
        """Write one array that is in memory, or mapped."""
        step = max(1, _CHUNK_BYTES // max(1, values.itemsize))
        pieces = (values[start : start + step] for start in range(0, len(values), step))
        self.write(name, pieces, values.dtype)

    def publish(self, **facts: Any) -> Path:
        """Put the folder where it belongs, durably; returns the path. `facts` go into the index."""
        from ds_core.checkpoint.files import create_synced, rename, sync_directory, write_all

        index = {"format": self.kind, "version": 1, **facts, "arrays": self._records}
        with create_synced(self._under_way / _INDEX) as file:
            write_all(file, (json.dumps(index, indent=1) + "\n").encode())
        sync_directory(self._under_way)
        if self._replaces and self.path.exists():
            shutil.rmtree(self.path)
        rename(self._under_way, self.path)
        return self.path

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._under_way, ignore_errors=True)


class StoredArrays:
    """A published folder: its facts, and its arrays mapped read-only.

    Raises DataError if it is missing, of another format, or if a file has not its size.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        try:
            index = json.loads((self.path / _INDEX).read_text())
        except OSError as error:
            raise DataError(
                f"{str(self.path)!r} is no {kind}: cannot read {_INDEX}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise DataError(f"{str(self.path / _INDEX)!r} is damaged: {error}") from error
        found = (index.get("format"), index.get("version")) if isinstance(index, dict) else None
        if found != (kind, 1):
            raise DataError(f"{str(self.path)!r} is {found}, expected ({kind!r}, 1)")
        self.facts: Mapping[str, Any] = {k: v for k, v in index.items() if k != "arrays"}
        self._records: dict[str, dict[str, Any]] = index["arrays"]
        for name, record in self._records.items():
            file = self.path / f"{name}.bin"
            size = file.stat().st_size if file.exists() else None
            if size != record["bytes"]:
                told = "is missing" if size is None else f"has {size} bytes"
                raise DataError(f"{str(file)!r} {told}, expected {record['bytes']}: write it again")

    def array(self, name: str) -> np.ndarray:
        """One array, `[count]`, mapped: nothing is read until it is used."""
        record = self._records[name]
        dtype = np.dtype(record["dtype"]).newbyteorder("<")
        if not record["count"]:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(self.path / f"{name}.bin", dtype, mode="r", shape=(record["count"],))

    def verify(self) -> None:
        """Read every byte. Raises DataError naming the file that is not as it was written."""
        for name, record in self._records.items():
            checksum, path = 0, self.path / f"{name}.bin"
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    checksum = zlib.crc32(chunk, checksum)
            if checksum != record["crc32"]:
                raise DataError(f"{str(path)!r} is damaged: its checksum differs; write it again")
