"""Reads boxes out of the data files of a checkpoint; every byte that is used is verified."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

import torch

from ds_core.checkpoint.boxes import Box, cut_reads
from ds_core.checkpoint.data_file import BLOCK_BYTES, PIECE_BYTES, block_checksums
from ds_core.checkpoint.files import open_to_read, read_exactly, reason, size_of
from ds_core.checkpoint.index import Index, StoredBox, TensorRecord
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

_MAX_OPEN_FILES = 64


class BoxReader:
    """Verified reads from the data files of one checkpoint; a context manager.

    A checkpoint of many ranks has more files than a process may open, so only the few that were
    used last stay open.

    Args:
        directory: where the files are.
        index: the checkpoint's index.

    Attributes:
        bytes_read: bytes read from data files so far. Reads are widened to whole blocks of
            `BLOCK_BYTES`, the unit of a checksum.
    """

    def __init__(self, directory: Place, index: Index) -> None:
        self.directory = directory
        self.index = index
        self.bytes_read = 0
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __enter__(self) -> BoxReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def copy(
        self, record: TensorRecord, stored: StoredBox, wanted: Box, target: torch.Tensor
    ) -> None:
        """Copy a part of a stored box into a tensor, converting to its dtype and device.

        Args:
            record: the tensor that the box is of.
            stored: the box.
            wanted: a block of it, with offsets relative to it.
            target: of shape `wanted.lengths`; may be a view.

        Raises:
            CheckpointError: if the file is missing, has another size than was saved, or a
                checksum does not match.
        """
        itemsize = record.dtype.itemsize
        reads = cut_reads(
            stored.box.lengths,
            wanted,
            max_gap=BLOCK_BYTES // itemsize,
            max_numel=PIECE_BYTES // itemsize,
        )
        for read in reads:
            flat = self._elements(record, stored, read.start, Box.whole(read.shape).numel)
            source = _narrow(flat.view(read.shape), read.crop)
            slot = target[read.at]
            if read.shape:
                slot = slot.narrow(0, read.row, read.shape[0])
            slot.copy_(source)

    def check(self, record: TensorRecord, stored: StoredBox) -> None:
        """Read a whole box and verify it. Raises CheckpointError as `copy` does."""
        step = PIECE_BYTES // record.dtype.itemsize
        for start in range(0, stored.box.numel, step):
            self._elements(record, stored, start, min(step, stored.box.numel - start))

    def open(self, name: str) -> BinaryIO:
        """The data file of that name, for reading; closed by this object.

        Raises:
            CheckpointError: if it cannot be opened or does not have the size that was saved.
        """
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        path, expected = self.directory / name, self.index.files[name]
        try:
            file, size = open_to_read(path), size_of(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot open {path}: {reason(error)}. The checkpoint is incomplete"
            ) from error
        self._files[name] = file
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        if size != expected:
            raise CheckpointError(
                f"{path} is {'truncated' if size < expected else 'damaged'}: it has {size} bytes, "
                f"{expected} were saved. Load another checkpoint"
            )
        return file

    def _elements(
        self, record: TensorRecord, stored: StoredBox, start: int, count: int
    ) -> torch.Tensor:
        """`[count]` verified elements of a box, from flat index `start`, on the CPU."""
        itemsize = record.dtype.itemsize
        box_bytes = stored.box.numel * itemsize
        first_block = start * itemsize // BLOCK_BYTES
        low = first_block * BLOCK_BYTES
        high = min(-(-(start + count) * itemsize // BLOCK_BYTES) * BLOCK_BYTES, box_bytes)
        with self._reading(stored) as file:
            data = read_exactly(file, stored.start + low, high - low)
        self.bytes_read += len(data)
        checksums = block_checksums(data)
        if tuple(checksums) != stored.crc32[first_block : first_block + len(checksums)] or (
            len(data) != high - low
        ):
            raise self._damage(stored, first_block, checksums)
        raw = torch.frombuffer(data, dtype=torch.uint8)
        return raw.view(record.dtype)[start - low // itemsize :][:count]

    def _damage(self, stored: StoredBox, first: int, found: list[int]) -> CheckpointError:
        """The error for blocks, from `first`, that are not what was saved."""
        bad = [first + i for i, crc in enumerate(found) if crc != stored.crc32[first + i]]
        at = bad[0] * BLOCK_BYTES if bad else (first + len(found)) * BLOCK_BYTES
        offsets, lengths = list(stored.box.offsets), list(stored.box.lengths)
        return CheckpointError(
            f"{self.directory / stored.file} is damaged: the bytes of {stored.entry!r} do not "
            "match the checksum that was saved with them "
            f"(tensor {stored.entry.rpartition('|')[0]!r}, box of {lengths} at {offsets}, in the "
            f"{BLOCK_BYTES} bytes from byte {stored.start + at} of the file). "
            "Load another checkpoint"
        )

    @contextlib.contextmanager
    def _reading(self, stored: StoredBox) -> Iterator[BinaryIO]:
        file = self.open(stored.file)
        try:
            yield file
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.directory / stored.file}: {reason(error)}"
            ) from error


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
